#!/usr/bin/env bash
# The experts' Hopper kernels on a GPU: each instruction, each kernel under awkward routings and at full width, times.
# usage: tests/bench/sm90.sh FOLDER [SM90_BENCH]    FOLDER then goes to tests/bench/sm90_record.py
# Every part runs under a limit of its own, so that a kernel that hangs ends alone; what has run to a right end in
# FOLDER, of the same sources, is passed over.
set -u
out=${1:?usage: tests/bench/sm90.sh FOLDER [SM90_BENCH]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bench=${2:-$root/build/release/bin/sm90_bench}
[[ -x $bench ]] || { echo "sm90: no $bench; with a CUDA toolkit: ninja -C build/release sm90_bench" >&2; exit 2; }
mkdir -p "$out"
sources=$(cat "$root"/kernels/cuda/sm90/* | sha256sum | cut -c 1-40)  # no git is needed where a GPU is
gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)
if [[ -e $out/machine.txt && $(sed 1d "$out/machine.txt") != "$sources"$'\n'"$gpu" ]]; then
  echo "sm90: $out is of other sources or another GPU" >&2
  exit 2
fi
{ date -u +%Y-%m-%dT%H:%M:%SZ; printf '%s\n%s\n' "$sources" "$gpu"; } >"$out/machine.txt"
status=0
part() {  # NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  [[ ! -e $out/$name.right ]] || return 0
  if timeout "$seconds" "$bench" "$@" >"$out/$name.txt"; then
    touch "$out/$name.right"
  else
    echo "$name: status $?"
    status=1
  fi
  grep -v '^[{]' "$out/$name.txt" | grep -v '^ok'
}
part check_instructions 30 instructions
for kernels in up rows dhidden dweights; do
  part "check_$kernels" 60 kernels $kernels
done
for tokens in 8192 16384 32768; do
  for routing in balanced zipf; do
    for kernels in up rows dhidden dweights; do
      part "times_${tokens}_${routing}_$kernels" 60 time $tokens $routing $kernels
    done
  done
done
exit $status
