#!/usr/bin/env bash
# The experts' Hopper kernels on a GPU: each instruction, each kernel under awkward routings and at full width, times.
# And every variant of each kernel, timed: the best are left in FOLDER/expert_variants.yaml, a table for configs/cuda.
# usage: tests/bench/sm90.sh FOLDER [SM90_BENCH]    FOLDER then goes to tests/bench/sm90_record.py; time_variants lies
# beside SM90_BENCH.
# Every part runs under a limit of its own, so that a kernel that hangs ends alone; what has run to a right end in
# FOLDER, of the same sources, is passed over.
set -u
out=${1:?usage: tests/bench/sm90.sh FOLDER [SM90_BENCH]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bench=${2:-$root/build/release/bin/sm90_bench}
variants=$(dirname "$bench")/time_variants
for program in "$bench" "$variants"; do
  [[ -x $program ]] && continue
  echo "sm90: no $program; with a CUDA toolkit: ninja -C build/release sm90_bench time_variants" >&2
  exit 2
done
mkdir -p "$out"
# No git is needed where a GPU is.
sources=$(cat "$root"/kernels/cuda/sm90/* "$root"/kernels/core/expert_variant.h | sha256sum | cut -c 1-40)
gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)
if [[ -e $out/machine.txt && $(sed 1d "$out/machine.txt") != "$sources"$'\n'"$gpu" ]]; then
  echo "sm90: $out is of other sources or another GPU" >&2
  exit 2
fi
{ date -u +%Y-%m-%dT%H:%M:%SZ; printf '%s\n%s\n' "$sources" "$gpu"; } >"$out/machine.txt"
status=0
part() {  # NAME SECONDS PROGRAM ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  [[ ! -e $out/$name.right ]] || return 0
  if timeout "$seconds" "$@" >"$out/$name.txt"; then
    touch "$out/$name.right"
  else
    echo "$name: status $?"
    status=1
  fi
  grep -v '^[{]' "$out/$name.txt" | grep -v '^ok'
}
# What is not right is not timed: one kernel that hangs would take the rest of a borrowed GPU's minutes, limit by limit.
is_right() {  # KERNELS
  [[ -e $out/check_$1_single.right && -e $out/check_$1_pairs.right ]]
}
part check_instructions 150 "$bench" instructions
part check_cross_entropy 30 "$bench" cross_entropy
experts_are_right=yes
for kernels in up rows dhidden dweights; do
  for how in single pairs; do part "check_${kernels}_$how" 30 "$bench" kernels "${kernels}_$how"; done
  is_right $kernels || { experts_are_right= && echo "$kernels: not right (above), and not timed"; }
done
[[ -z $experts_are_right ]] || touch "$out/checks.right"
# Nor again with more tokens, where it did not end well with fewer: a variant that hangs shows itself here only.
declare -A in_vain=()
timed() {  # KERNELS NAME SECONDS PROGRAM ARGUMENTS...
  local kernels=$1 what
  what=${2%%_*}_${2##*[0-9]_}
  is_right "$kernels" && [[ -z ${in_vain[$what]:-} ]] || return 0
  part "${@:2}"
  [[ -e $out/$2.right ]] || in_vain[$what]=yes
}
for tokens in 8192 16384 32768; do
  for routing in balanced zipf; do
    for kernels in up rows dhidden dweights; do
      timed $kernels "times_${tokens}_${routing}_$kernels" 60 "$bench" time $tokens $routing $kernels
    done
  done
  for kernel in up down dx dhidden dw_gate_up dw_down; do
    case $kernel in down | dx) kernels=rows ;; dw_*) kernels=dweights ;; *) kernels=$kernel ;; esac
    timed $kernels "variants_${tokens}_$kernel" 60 "$variants" "$out/expert_variants.yaml" --tokens $tokens \
      --kernels $kernel
  done
done
exit $status
