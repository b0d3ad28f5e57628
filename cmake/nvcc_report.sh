#!/usr/bin/env bash
# Runs a compiler command and puts what ptxas says of each kernel (registers, stack, spills) into a file beside the
# object, out of the way of the build's own output. usage: nvcc_report.sh COMPILER ARGUMENTS...
set -uo pipefail
object=
for ((i = 1; i <= $#; i++)); do
  [[ ${!i} == -o ]] && { next=$((i + 1)); object=${!next}; }
done
if [[ -z $object ]]; then exec "$@"; fi
said=$(mktemp)
trap 'rm -f "$said"' EXIT
"$@" 2>"$said"
status=$?
if [[ $status -eq 0 && -s $said ]]; then
  grep -E '^(ptxas info|    [0-9]+ bytes stack frame)' "$said" >"$object.ptxas"
  grep -vE '^(ptxas info|    [0-9]+ bytes stack frame)' "$said" >&2
else
  cat "$said" >&2
fi
exit "$status"
