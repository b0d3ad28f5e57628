#!/usr/bin/env python3
"""A comparison as arms x paired seeds: what a claim is worth on this machine, with error bars. Usually started as
`upmoe study`.

Each arm is a chain of ordinary commands (tokenize, train, upcycle, train, eval) of configs/studies/*.yaml. A pair of
runs shares its seed: the order of the data, the dense source and the held-out sequences. Every arm gets the learning
rate that does best over one grid, with a seed of their own. A study that was stopped or killed goes on
when it is started again. docs/studies.md tells more.
"""

# First: a key pressed while libraries load is heard.
from command_line import (BadInput, BadUsage, ToolParser, display, end_without_package, line_time, missing_package,
                          run_tool)

import argparse
import math
import shutil
import signal
import sys
import time
from pathlib import Path

try:
    from study_check import check_arms
    from study_chain import PLANTED, TUNING_SEED, Builder, differences, plant, planted_name
    from study_file import ROOT, SIZES, STANDARD_TEXT, find, names, read_study
    from study_plan import Clock, Plan, minutes
    from study_measures import MEASURES
    from study_provenance import write_provenance
    from study_result import Outcome, verdict_lines, write_result, write_tables
    from study_work import STOPPED, StageFailed, Stopped, Work, last_step
except ImportError as missing:
    end_without_package("upmoe", missing_package(missing))

CLEAR = "\r\x1b[K"  # the line of a terminal
SAY_EVERY = 60.0  # seconds between lines about one training, where no terminal shows a counter


class Teller:
    """Progress: one line that changes on a terminal, plain lines elsewhere."""

    def __init__(self):
        self.terminal, self.told = sys.stderr.isatty(), time.monotonic()

    def say(self, text):
        print(f"{CLEAR if self.terminal else ''}{line_time()}study: {text}", file=sys.stderr, flush=True)
        self.told = time.monotonic()

    def count(self, text):
        if self.terminal:
            room = shutil.get_terminal_size().columns - 1
            print(f"{CLEAR}{text[:room]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.told >= SAY_EVERY:
            self.say(text)


class Driver:
    """Does the runs of a study, in order, and tells how far it is."""

    def __init__(self, study, work, teller):
        self.study, self.work, self.teller = study, work, teller
        self.builder = Builder(study)
        self.plan = Plan(work, self.builder)
        self.lost = []    # (run, why) of those that failed; the others go on
        self.broken = {}  # stage id: why, for the runs that have that stage too

    def check(self):
        check_arms(self.work, self.builder, [arm for arm in self.study.arms if arm not in self.planted()],
                   self.teller.say)

    def tuning(self):
        return [run for arm in self.study.arms if arm not in self.planted() for run in self.builder.tuning(arm)]

    def planted(self):
        """{planted arm: the arm whose rate it has a tenth of}."""
        return {planted_name(arm): arm for arm in self.study.arms if planted_name(arm) in self.study.arms}

    def paired(self, seeds, rates):
        """By seed, so that a study that is cut short has whole pairs; of arms that have a rate."""
        return [self.builder.run(arm, seed, rates[arm]) for seed in range(TUNING_SEED + 1, seeds + 1)
                for arm in self.study.arms if arm in rates]

    def perform(self, runs, clock, ahead, do):
        """`ahead`: what comes after these runs, for the time left; `do`: Work.ensure, or what takes its place."""
        def time_left(run, stage, steps):
            lost = {run.last.id for run, _ in self.lost}
            share = min(1.0, steps / stage.steps) if steps else 0.0
            return minutes(clock.left([run for run in [*runs, *ahead] if run.last.id not in lost], (run, stage), share))

        for i, run in enumerate(runs):
            if self.work.finished(run.last):
                continue
            place = f"{i + 1}/{len(runs)} arm '{run.arm}', seed {run.seed}, rate {run.rate:g}"

            def begin(stage, run=run, place=place):
                what = f"train {stage.steps} steps" if stage.kind == "train" else stage.kind
                left = time_left(run, stage, last_step(self.work.run_dir(stage)))  # steps of a training that goes on
                self.teller.say(f"{place}: {what}; left: {left}")
                self.stage = stage

            def progress(steps, run=run, place=place):
                left = time_left(run, self.stage, steps)
                self.teller.count(f"{place}: step {steps} of {self.stage.steps}; left: {left}")

            why = next((self.broken[stage.id] for stage in run.stages if stage.id in self.broken), None)
            try:
                if why is None:
                    do(run, begin, progress)
            except StageFailed as problem:
                why = self.broken[self.stage.id] = str(problem)
                self.teller.say(f"{place}: failed, the other runs go on: {why}")
            if why:
                self.lost.append((run, why))
            self.work.drop_models(run, runs[i + 1:])

    def tell_lost(self):
        """Ends a study of which something failed; each reason once."""
        reasons = {}
        for run, why in self.lost:
            reasons.setdefault(why, []).append(f"arm '{run.arm}', seed {run.seed}, rate {run.rate:g}")
        if reasons:
            text = "; ".join(f"{', '.join(runs)}: {why}" for why, runs in reasons.items())
            raise BadInput(f"{text}; the logs are in {display(self.work.folder)}/stages; the same command tries these "
                           "again and keeps the rest")

    def choose_rates(self):
        """Of each arm the rate that ended lowest."""
        rates, lost = {}, {run.arm for run, _ in self.lost}
        for arm in self.study.arms:
            if arm not in self.planted() and arm not in lost:
                runs = self.builder.tuning(arm)
                losses = [self.work.loss(run.last) for run in runs]
                if losses and min(losses) == math.inf:
                    raise BadInput(f"arm '{arm}' diverged at every learning rate of the grid; give it lower `rates`")
                rates[arm] = runs[losses.index(min(losses))].rate if runs else self.study.rates[0]
        for name, arm in self.planted().items():
            if arm in rates:
                rates[name] = rates[arm] * PLANTED
        return rates

    def differing(self, record):
        """In what the study now differs from a finished run of another form of it; nothing where it would make it."""
        arm, seed, rate = record["arm"], record["seed"], record["rate"]
        now = [self.builder.run(arm, seed, rate), self.builder.run(arm, seed, rate, probe=True),
               self.builder.run(arm, seed, rate, self.study.figures["tune_share"])]
        return min((differences(record["story"], run.story) for run in now), key=len)

    def tell_others(self):
        """What lies finished there and is not used, once for each reason."""
        lines = {}
        for record in self.work.finished_runs():
            arm = record["arm"]
            if arm not in self.study.arms:
                why = f"an arm '{arm}', which the study does not have"
            elif changed := self.differing(record):
                why = f"arm '{arm}', which were made otherwise: {', '.join(changed)}"
            else:
                continue
            lines[why] = lines.get(why, 0) + 1
        for why, count in lines.items():
            self.teller.say(f"not used, finished runs of {why} ({count})")

    def fits(self, paired, seeds):
        """What `upmoe cost --fit` says of the arms with a source, seed by seed."""
        found = []
        for seed in range(TUNING_SEED + 1, seeds + 1) if self.study.fit else ():
            runs = [run for run in paired if run.seed == seed and run.charged and
                    any(stage.kind == "upcycle" for stage in run.stages)]
            words = [*self.work.program, "cost", "--fit", *(self.work.run_dir(run.last) for run in runs), "--source",
                     *(self.work.run_dir(run.charged[-1]) for run in runs)]
            try:
                found.append(f"seed {seed}\n" + self.work.call(words, self.work.folder / "fit.log"))
            except StageFailed as problem:
                found.append(f"seed {seed}: no fit: {problem}")
        return found


def has_curves(study):
    return any(MEASURES[comparison.by].curves for comparison in study.compare)


def pictures():
    """The module that draws, loaded where something is drawn: it takes a second."""
    try:
        import study_picture
    except ImportError as missing:
        raise BadUsage(missing_package(missing)) from None
    return study_picture


def list_studies():
    for name in names():
        study = None
        for size in SIZES:
            try:
                study = study or read_study(find(name), size)
            except BadUsage:
                continue
        print(f"{name:14} {len(study.arms):2} arms  {study.claim}" if study else f"{name:14} cannot be read")


def conclude(driver, paired, rates, seeds):
    study, folder, lost = driver.study, driver.work.folder, {run.arm for run, _ in driver.lost}
    paired = [run for run in paired if run.arm not in lost]
    outcomes = {arm: [Outcome(driver.work, run) for run in paired if run.arm == arm]
                for arm in study.arms if arm in rates and arm not in lost}
    if not outcomes:
        return
    written = list(write_tables(folder, study, outcomes, rates, driver.fits(paired, seeds)))
    if has_curves(study):
        written.append(pictures().draw_curves(folder, study, outcomes))
    written.append(write_result(folder, study, outcomes, rates))
    written.append(write_provenance(driver.work, study, [*driver.tuning(), *paired]))
    driver.work.link_runs(paired)
    for line in verdict_lines(study, outcomes):
        print(line.replace("*", "").strip())
    print(*written, sep="\n")


def conduct(args, driver):
    study, work, teller = driver.study, driver.work, driver.teller
    work.make_tokens(teller.say)
    driver.plan.probe(teller.say)
    tuning = driver.tuning()
    chosen = all(work.finished(run.last) for run in tuning)
    guessed = driver.choose_rates() if chosen else dict.fromkeys(study.arms, study.rates[0])
    expected = driver.paired(args.seeds, guessed)
    driver.plan.require_disk([*tuning, *expected])
    driver.tell_others()
    for line in driver.plan.lines(tuning, expected):
        print(line, flush=True)
    if args.dry:
        return 0
    driver.perform(tuning, Clock(driver.plan, [*tuning, *expected], time.monotonic), expected, work.ensure_or_diverge)
    rates = driver.choose_rates()
    for arm, rate in rates.items():
        teller.say(f"arm '{arm}': learning rate {rate:g}")
    paired = driver.paired(args.seeds, rates)
    driver.perform(paired, Clock(driver.plan, paired, time.monotonic), [], work.ensure)
    conclude(driver, paired, rates, args.seeds)
    driver.tell_lost()
    return 0


def parse_arguments():
    parser = ToolParser(prog="upmoe study", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", metavar="NAME", help="a study of configs/studies, or a file")
    parser.add_argument("--size", choices=SIZES, default="micro", help="of models, data and steps (default: micro)")
    parser.add_argument("--seeds", type=int, default=3, help="pairs (default: 3)")
    parser.add_argument("--list", action="store_true", help="the studies there are")
    parser.add_argument("--dry", action="store_true", help="probe the arms, print the plan and stop")
    parser.add_argument("--plant", metavar="ARM", help="test of the study itself: that arm against the same with a "
                        "tenth of its learning rate, which must come out worse")
    parser.add_argument("--text", metavar="DIR", help="folder of text files instead of the study's first text")
    parser.add_argument("--out", type=Path, help="folder of everything (default: runs/study/NAME/SIZE)")
    parser.add_argument("--upmoe", default=str(ROOT / "build/release/upmoe"), help="the program (default: %(default)s)")
    args = parser.parse_args()
    if not args.list and args.study is None:
        parser.error("a study's name is missing; --list shows them")
    if args.seeds < 1:
        parser.error("--seeds: at least 1")
    return args


def main():
    args = parse_arguments()
    if args.list:
        list_studies()
        return 0
    study, teller = read_study(find(args.study), args.size), Teller()
    if args.plant:
        study = plant(study, args.plant)
    if args.text:
        if not Path(args.text).is_dir():
            raise BadInput(f"--text {display(args.text)}: no folder")
        study.texts[study.main_text] = str(Path(args.text).resolve())
    for text, folder in study.texts.items():
        if folder != STANDARD_TEXT and not (ROOT / folder).is_dir():
            raise BadInput(f"text {text}: {display(folder)} is no folder; no arm that trains on it can run")
    program = Path(args.upmoe).resolve()
    if shutil.which(program) is None:
        raise BadUsage(f"{display(program)}: no such program; launch/setup.sh makes build/release/upmoe, and --upmoe "
                       "names another")
    if has_curves(study) and not args.dry:
        pictures()  # what it lacks is told before hours of training, not behind them
    folder = (args.out or Path("runs/study") / study.name / args.size).resolve()
    work = Work(folder, [program], study)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, work.request_stop)
    driver = Driver(study, work, teller)
    try:
        driver.check()  # while nothing is there yet
        with work.alone():
            return conduct(args, driver)
    except Stopped:
        teller.say("stopped; the same command goes on from here")
        return STOPPED
    except StageFailed as problem:
        raise BadInput(f"{problem}; the logs are in {display(folder)}, tokens/log.txt and stages/*/log.txt; the same "
                       "command goes on") from None


if __name__ == "__main__":
    sys.exit(run_tool("upmoe study", main))
