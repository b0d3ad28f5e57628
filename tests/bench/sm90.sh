#!/usr/bin/env bash
# The experts' Hopper kernels, and cross-entropy's, on a GPU.
#
#   tests/bench/sm90.sh FOLDER [SM90_BENCH [STAGE...]]
#
# Stages, all three unless named: checks (each instruction, each kernel under awkward routings and at full width),
# times, variants (of each kernel: the best are left in FOLDER/expert_variants.yaml, a table for configs/cuda). FOLDER
# then goes to tests/bench/sm90_record.py; time_variants lies beside SM90_BENCH.
# Every program runs under a limit of its own, so that a kernel that hangs ends alone; what has run to a right end in
# FOLDER, of the same sources, is passed over.
set -u
out=${1:?usage: tests/bench/sm90.sh FOLDER [SM90_BENCH [STAGE...]]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bench=${2:-$root/build/release/bin/sm90_bench}
variants=$(dirname "$bench")/time_variants
shift $(($# < 2 ? $# : 2))
[[ $# -gt 0 ]] || set -- checks times variants
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
hung=0  # checks that did not end; behind two of them the others would take their limits one by one
part() {  # NAME SECONDS PROGRAM ARGUMENTS...
  local name=$1 seconds=$2 ended=0
  shift 2
  [[ ! -e $out/$name.right ]] || return 0
  if ((hung >= 2)); then
    echo "$name: left out, as two before it hung"
    status=1
    return
  fi
  timeout -k 2 "$seconds" "$@" >"$out/$name.txt" || ended=$?
  if [[ $ended -eq 0 ]]; then
    touch "$out/$name.right"
  else
    echo "$name: status $ended"
    status=1
    if ((ended == 124 || ended == 137)); then ((hung += 1)); fi
  fi
  grep -v '^[{]' "$out/$name.txt" | grep -v '^ok'
}
# The kernels that runs take are pairs of blocks. What is not right is not timed.
is_right() { [[ -e $out/check_$1_pairs.right ]]; }  # KERNELS

stage_checks() {
  local kernels right=yes
  part check_instructions 60 "$bench" instructions
  part check_cross_entropy 20 "$bench" cross_entropy
  for kernels in up rows dhidden dweights; do
    part "check_${kernels}_pairs" 20 "$bench" kernels "${kernels}_pairs"
    is_right $kernels || { right= && echo "$kernels: not right (above), and not timed"; }
  done
  [[ -z $right ]] || touch "$out/checks.right"
  # Blocks of their own, which are other variants; of the gradient of the hidden rows there are none.
  for kernels in up rows dweights; do part "check_${kernels}_single" 20 "$bench" kernels "${kernels}_single"; done
}

# Nor again with more tokens, where it did not end well with fewer: a variant that hangs shows itself here only.
declare -A in_vain=()
timed() {  # KERNELS NAME SECONDS PROGRAM ARGUMENTS...
  local kernels=$1 what
  what=${2%%_*}_${2##*[0-9]_}
  is_right "$kernels" && [[ -z ${in_vain[$what]:-} ]] || return 0
  part "${@:2}"
  [[ -e $out/$2.right ]] || in_vain[$what]=yes
}

stage_times() {
  local tokens routing kernels
  for tokens in 8192 16384 32768; do
    for routing in balanced zipf; do
      for kernels in up rows dhidden dweights; do
        timed $kernels "times_${tokens}_${routing}_$kernels" 30 "$bench" time $tokens $routing $kernels
      done
    done
  done
}

# Bits are compared with the fewest tokens: with more it is the copies to the host that take the time.
stage_variants() {
  local tokens kernel kernels compared=()
  for tokens in 8192 16384 32768; do
    for kernel in up down dx dhidden dw_gate_up dw_down; do
      case $kernel in down | dx) kernels=rows ;; dw_*) kernels=dweights ;; *) kernels=$kernel ;; esac
      [[ $kernels == dhidden || -e $out/check_${kernels}_single.right ]] || continue
      timed $kernels "variants_${tokens}_$kernel" 60 "$variants" "$out/expert_variants.yaml" --tokens $tokens \
        --kernels $kernel "${compared[@]}"
    done
    compared=(--uncompared)
  done
}

for stage in "$@"; do
  declare -F "stage_$stage" >/dev/null || { echo "sm90: no stage '$stage'" >&2; exit 2; }
done
for stage in "$@"; do "stage_$stage"; done
exit $status
