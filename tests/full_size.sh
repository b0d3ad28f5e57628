#!/usr/bin/env bash
# Qwen1.5-1.8B's shape into Qwen1.5-MoE-A2.7B's, at full size: counts, memory, speed against dd, too little disk.
#
#   tests/full_size.sh [WORKDIR]     WORKDIR needs about 34 GB free (default: build/full_size); takes some minutes.
#
# UPMOE names the program (default: build/release/upmoe), RANKS > 1 starts it under mpirun. Random weights, nothing is
# downloaded. Not part of the test suite. Removes what it made.
set -euo pipefail
usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; exit 2 ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
upmoe=${UPMOE:-$root/build/release/upmoe}
work=${1:-$root/build/full_size}
recipe=$root/configs/upcycle/qwen1.5-moe-a2.7b.yaml
bytes=28631568384 # of tensors
ranks=${RANKS:-1}

die() {
  echo "full_size: $*" >&2
  exit 1
}

[[ -x $upmoe ]] || die "no program at $upmoe; run launch/setup.sh or set UPMOE"
mkdir -p "$work"
work=$(cd "$work" && pwd)
dense=$work/qwen1.5-1.8b-random moe=$work/moe zeros=$work/zeros
cleanup() {
  rm -rf "$dense" "$moe" "$moe.tmp" "$zeros" "$work/upcycle.txt"
  rmdir --ignore-fail-on-non-empty "$work"
}
trap cleanup EXIT
free=$(df --output=avail -B1 "$work" | tail -n 1)
((free > 34000000000)) || die "$work has $((free / 1000000000)) GB free, 34 are needed"

run=("$upmoe" upcycle "$recipe" --from "$dense" --to "$moe")
((ranks == 1)) || run=(mpirun --oversubscribe --bind-to none -np "$ranks" "${run[@]}")

# Seconds that writing as many zeros takes, the disk at rest before.
time_dd() {
  sync
  local start end
  start=$(date +%s.%N)
  dd if=/dev/zero of="$zeros" bs=8M count=$bytes iflag=count_bytes conv=fsync status=none
  end=$(date +%s.%N)
  rm -f "$zeros"
  python3 -c "print(f'{$end - $start:.2f}')"
}

echo "== too little disk is told before the first byte"
"$root/launch/make_random_dense.py" "$dense"
small=$(mktemp -d "$work/small.XXXX")
flags=-m
((EUID == 0)) || flags=-rm
status=0
# A file system of 64 MB that ends with its mount namespace.
unshare $flags bash -c '
  set -euo pipefail
  small=$1 upmoe=$2 recipe=$3 dense=$4
  mount -t tmpfs -o size=64m tmpfs "$small"
  status=0
  "$upmoe" upcycle "$recipe" --from "$dense" --to "$small/moe" || status=$?
  [[ -z $(ls -A "$small") ]] || { echo "something was written" >&2; exit 1; }
  exit $status
' _ "$small" "$upmoe" "$recipe" "$dense" >"$work/upcycle.txt" 2>&1 || status=$?
rmdir "$small"
grep "not enough disk" "$work/upcycle.txt" || { cat "$work/upcycle.txt"; die "no such message"; }
[[ $status == 3 ]] || die "exit status $status, expected 3"

echo "== dd conv=fsync of the same bytes, before"
before=$(time_dd)
echo "$before s"

echo "== upcycle"
sync
python3 - "$work/upcycle.txt" "${run[@]}" <<'PY'
import resource, subprocess, sys, time
start = time.time()
status = subprocess.run(sys.argv[2:]).returncode
seconds = time.time() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest process
print(f"{seconds:.2f} s, peak resident memory {peak / 2**20:.0f} MiB")
open(sys.argv[1], "w").write(f"{seconds} {peak}\n")
if status:
    sys.exit(f"full_size: upcycle ended with status {status}")
if peak >= 2 << 30:
    sys.exit("full_size: peak resident memory is 2 GiB or more")
PY
read -r seconds _ <"$work/upcycle.txt"

echo "== what was written"
python3 - "$moe" <<'PY'
import json, math, struct, sys
from pathlib import Path
moe = Path(sys.argv[1])
shards = sorted(moe.glob("model-*.safetensors"))
index = json.loads((moe / "model.safetensors.index.json").read_text())
tensors = parameters = size = 0
for shard in shards:
    with open(shard, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    end = max(entry["data_offsets"][1] for entry in header.values())
    assert shard.stat().st_size == 8 + length + end, shard
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", name
        assert index["weight_map"][name] == shard.name, name
    tensors += len(header)
    parameters += sum(math.prod(entry["shape"]) for entry in header.values())
    size += end
found = dict(tensors=tensors, parameters=parameters, shards=len(shards), bytes=size,
             total_size=index["metadata"]["total_size"], indexed=len(index["weight_map"]))
expected = dict(tensors=4659, parameters=14_315_784_192, shards=8, bytes=28_631_568_384, total_size=28_631_568_384,
                indexed=4659)
print(found)
if found != expected:
    sys.exit(f"full_size: expected {expected}")
layers = json.loads((moe / "upcycle_report.json").read_text())["layers"]
assert all((l["copies_min"], l["copies_max"], l["redrawn_neurons_per_expert"]) == (15, 16, 704) for l in layers), layers
print("relative error of the layers:", min(l["relative_error"] for l in layers), "to",
      max(l["relative_error"] for l in layers))
PY
rm -rf "$moe"

echo "== dd conv=fsync of the same bytes, after"
after=$(time_dd)
echo "$after s"
python3 - "$before" "$after" "$seconds" $bytes <<'PY'
import sys
before, after, seconds, size = map(float, sys.argv[1:])
dd = (before + after) / 2
print(f"dd {size / dd / 1e6:.0f} MB/s (mean of {size / before / 1e6:.0f} and {size / after / 1e6:.0f}), "
      f"upcycle {size / seconds / 1e6:.0f} MB/s, ratio {dd / seconds:.2f}")
if dd / seconds < 0.70:
    sys.exit("full_size: less than 70 % of dd's speed")
PY
echo "full size: all right"
