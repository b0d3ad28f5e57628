#!/usr/bin/env python3
"""Flat exchange of expert rows against the one by nodes, over a link of limited rate. Started by exchange.sh.

Each rate limits what a host sends (tc tbf). The two kinds of exchange take turns; a step's time is the median, the
bytes are those that the hosts' interfaces counted over the whole run, start-up included. The result is printed and
written to tests/bench/results/.
"""

import subprocess
import sys
from pathlib import Path
from statistics import median

from bench_record import ROOT, parser_of, run_tool, train, write_record

HOSTS = ("upmoe-node1", "upmoe-node2")


def limit(rate):
    """What each host sends; the bridge's side is left alone."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "exec", host, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf",
                        "rate", rate, "burst", "256kb", "latency", "50ms"], check=True)


def sent():
    def of(host):
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        done = subprocess.run(["ip", "netns", "exec", host, "cat", path], capture_output=True, text=True, check=True)
        return int(done.stdout)
    return sum(map(of, HOSTS))


def launcher(work, network):
    inside = f"hostname {HOSTS[0]}; exec \"$@\""
    return ["nsenter", f"--net=/run/netns/{HOSTS[0]}", "unshare", "--uts", "sh", "-c", inside, "sh",
            ROOT / "launch" / "run_hosts.sh", "--hostfile", work / "hostfile", "--deadline", "120", "--restarts", "0",
            "--interface", network, "--rsh", work / "agent"]


def main():
    parser = parser_of(__doc__, ["tiny"], ["fp32"])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit", "10gbit"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--network", required=True)
    args = parser.parse_args()
    results = []
    print("2 hosts x 2 ranks, ep 4: seconds of a step flat, by nodes, ratio; bytes between hosts flat, by nodes, ratio")
    for shape in args.shapes:
        for precision in args.precisions:
            for rate in args.rates:
                limit(rate)
                found = {0: [], 2: []}
                for _ in range(args.rounds):
                    for nodes, rounds in found.items():
                        before = sent()
                        records, _ = train(args.work, args.binary, shape, precision, ranks=4, threads=4,
                                           steps=args.steps + args.warmup, micro_batches=4,
                                           parallel={"ep": 4, "node_ranks": nodes},
                                           launcher=launcher(args.work, args.network))
                        rounds.append({"step_s": median(r["seconds"] for r in records[args.warmup:]),
                                       "bytes": sent() - before, "loss": records[-1]["loss"]})
                flat, nodes = ({key: median(r[key] for r in found[n]) for key in ("step_s", "bytes")} for n in (0, 2))
                results.append({"shape": shape, "precision": precision, "rate": rate, "flat": found[0],
                                "by_nodes": found[2], "speed_ratio": flat["step_s"] / nodes["step_s"],
                                "bytes_ratio": nodes["bytes"] / flat["bytes"]})
                print(f"{shape:6}{precision:6}{rate:9}{flat['step_s']:9.3f}{nodes['step_s']:9.3f}"
                      f"{flat['step_s'] / nodes['step_s']:7.2f}x{flat['bytes']:14,.0f}{nodes['bytes']:14,.0f}"
                      f"{nodes['bytes'] / flat['bytes']:7.2f}", flush=True)
    own = {"--work", str(args.work), "--network", args.network}  # exchange.sh's, no business of whoever repeats this
    write_record(args.out, "exchange.sh", [a for a in sys.argv[1:] if a not in own], results)


if __name__ == "__main__":
    sys.exit(run_tool("exchange", main))
