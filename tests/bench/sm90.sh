#!/usr/bin/env bash
# The experts' Hopper kernels on a GPU: each instruction, each kernel under awkward routings and at full width, times.
# usage: tests/bench/sm90.sh FOLDER [SM90_BENCH]    FOLDER then goes to tests/bench/sm90_record.py
# Every part runs under a limit of its own, so that a kernel that hangs ends alone.
set -u
out=${1:?usage: tests/bench/sm90.sh FOLDER [SM90_BENCH]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bench=${2:-$root/build/release/bin/sm90_bench}
[[ -x $bench ]] || { echo "sm90: no $bench; with a CUDA toolkit: ninja -C build/release sm90_bench" >&2; exit 2; }
mkdir -p "$out"
{
  date -u +%Y-%m-%dT%H:%M:%SZ
  cat "$root"/kernels/cuda/sm90/* | sha256sum | cut -c 1-40  # no git is needed where a GPU is
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} >"$out/machine.txt"
status=0
part() {  # NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  timeout "$seconds" "$bench" "$@" >"$out/$name.txt" || { echo "$name: status $?"; status=1; }
  grep -v '^[{]' "$out/$name.txt" | grep -v '^ok'
}
part check_instructions 30 instructions
for kernels in up rows dhidden dweights; do
  part "check_$kernels" 60 kernels $kernels
done
for tokens in 8192 16384 32768; do
  for kernels in up rows dhidden dweights; do
    part "times_${tokens}_$kernels" 60 time $tokens $kernels
  done
done
exit $status
