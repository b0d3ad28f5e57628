"""Whatever happens to one rank, the job ends within seconds, with a status and one message.

usage: abort_test.py MPIEXEC ABORT_RANKS [ranks ...]
"""

import os
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from functools import cache

MPIEXEC, PROGRAM, RANKS = sys.argv[1], sys.argv[2], [int(n) for n in sys.argv[3:]] or [2, 3]
SECONDS = 10.0
# In this order, so that those which wait longest and those which compute while they wait are beside idle ones.
MODES = ("ring", "slow", "works", "hang", "subgroup", "stopped", "leaves", "exit", "exit_zero", "killed", "segfault",
         "throw", "agreed", "fine")
AT_ONCE = ThreadPoolExecutor(3)  # jobs: nearly all of their time they wait for a deadline


@cache
def started(ranks, mode):
    return AT_ONCE.submit(run, ranks, mode)


def job(ranks, mode):
    """(status, what it printed, what it said, seconds) of the job, which is run once however many look at it."""
    return started(ranks, mode).result()


def run(ranks, mode):
    command = [PROGRAM, mode]
    if ranks > 1:
        command = [MPIEXEC, "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] + command
    environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - begin


class OneRankGoesWrong(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        for mode in MODES:
            for ranks in RANKS:
                if mode != "leaves" or ranks == RANKS[0]:
                    started(ranks, mode)

    def ends(self, ranks, mode):
        status, out, error, seconds = job(ranks, mode)
        self.assertNotEqual(status, 0, (ranks, mode, out, error))
        self.assertLess(seconds, SECONDS, (ranks, mode))
        self.assertNotIn("came to its end", out)
        return status, error

    def test_fine(self):
        for ranks in [1] + RANKS:
            for mode in ("fine", "slow"):
                status, out, error, _ = job(ranks, mode)
                self.assertEqual((status, out), (0, "rank 0 came to its end\n"), (ranks, mode, error))

    def test_a_rank_is_gone(self):
        for ranks in RANKS:
            for mode in ("exit", "exit_zero", "killed", "segfault"):
                self.ends(ranks, mode)

    def test_a_thrown_error_is_printed_once_and_gives_the_status(self):
        for ranks in RANKS:
            status, error = self.ends(ranks, "throw")
            self.assertEqual(status, 3, error)
            self.assertEqual(error.count("shard 7 is torn"), 1, error)
            self.assertIn(f"upmoe: error: rank {ranks - 1}: shard 7 is torn", error)

    def test_an_agreed_error_is_printed_once_and_gives_the_status(self):
        for ranks in RANKS:
            status, out, error, seconds = job(ranks, "agreed")
            self.assertEqual(status, 4, error)
            self.assertLess(seconds, SECONDS)
            self.assertEqual(error.count("loss is NaN"), 1, error)
            self.assertEqual(error.count("upmoe: error:"), 1, error)

    def test_a_hang_is_named(self):
        for ranks in RANKS:
            status, error = self.ends(ranks, "hang")
            self.assertEqual(status, 70, error)
            self.assertIn("no progress for", error)
            named = [line for line in error.splitlines() if "the collective all_gather" in line]
            stuck = [line for line in error.splitlines() if "no collective was under way" in line]
            self.assertTrue(named or stuck, error)
            # Every rank's clock started with the same collective: whoever speaks first ends the job.
            for line in stuck:
                self.assertIn(f"rank {ranks - 1}:", line)

    def test_ranks_wait_for_one_that_is_stopped_or_left(self):
        for mode in ("stopped", "leaves"):
            status, out, error, seconds = job(RANKS[0], mode)
            self.assertEqual(status, 70, (mode, out, error))
            self.assertLess(seconds, SECONDS, mode)
            self.assertIn(f"the collective all_gather (number 2) did not finish: nothing yet from rank {RANKS[0] - 1}",
                          error)
            self.assertIn("last finished: all_reduce(1)", error)

    def test_one_message_names_the_rank_of_the_job_that_is_missing(self):
        for ranks in RANKS:
            for mode, collective in (("stopped", "all_gather (number 2)"), ("subgroup", "all_reduce (number 2)")):
                status, error = self.ends(ranks, mode)
                self.assertEqual(status, 70, error)
                self.assertEqual(error.count("upmoe: error:"), 1, error)
                self.assertIn(f"the collective {collective} did not finish: nothing yet from rank {ranks - 1},", error)

    def test_a_peer_that_works_for_long_is_no_hang(self):
        for ranks in RANKS:
            status, out, error, _ = job(ranks, "works")
            self.assertEqual((status, out), (0, "rank 0 came to its end\n"), (ranks, error))

    def test_signs_of_life_do_not_keep_a_deadlock_alive(self):
        for ranks in RANKS:
            status, error = self.ends(ranks, "ring")
            self.assertEqual(status, 70, error)

    def test_one_rank_alone(self):
        status, error = self.ends(1, "throw")
        self.assertEqual(status, 3)
        # Not on a terminal: with the time.
        self.assertRegex(error, r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d upmoe: error: shard 7 is torn\n\Z")
        status, error = self.ends(1, "hang")
        self.assertEqual(status, 70)
        self.assertIn("this rank itself is stuck or slow", error)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
