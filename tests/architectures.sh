#!/usr/bin/env bash
# The program for other processors than this one: built for x86-64-v3 (AVX2) and x86-64-v4 (AVX-512) under build/, and
# tested: every op, the golden models, the commands. What this processor cannot run is built alone, and said.
#
#   tests/architectures.sh [ARCHITECTURE...]     default: x86-64-v3 x86-64-v4
#
# By hand: each is a build of its own, some minutes. Needs what launch/setup.sh installs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
runs_here() {  # the C library knows. (grep -q would end the pipe early, which pipefail takes for a no.)
  /lib64/ld-linux-x86-64.so.2 --help | grep "^  $1 (supported" >/dev/null
}

case ${1:-} in
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; exit 2 ;;
esac
architectures=("$@")
[[ $# -gt 0 ]] || architectures=(x86-64-v3 x86-64-v4)
# Every op's tests, as CMake lists them, and what else computes.
mapfile -t tests < <(sed -n '/^foreach(name core_test/,/)$/p' tests/kernels/CMakeLists.txt | grep -o '[a-z0-9_]*_test' |
  sed 's/_test$//')
[[ ${#tests[@]} -gt 20 ]] || { echo "architectures: tests/kernels/CMakeLists.txt lists no ops any more" >&2; exit 1; }
tests+=(processor golden batch_mates unit_map transforms normal_batch resume)
not_run=()
for architecture in "${architectures[@]}"; do
  build=build/$architecture
  echo "== $architecture"
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DUPMOE_ARCH="$architecture" -DUPMOE_CUDA=OFF >/dev/null
  cmake --build "$build" --target upmoe make_run "${tests[@]/%/_test}"
  if runs_here "$architecture"; then
    # oneDNN chooses its instructions when it runs; there too no more than the architecture has.
    instructions=AVX2
    [[ $architecture != x86-64-v4 ]] || instructions=AVX512_CORE
    ONEDNN_MAX_CPU_ISA=$instructions ctest --test-dir "$build" --output-on-failure \
      -R "^($(IFS='|'; echo "${tests[*]}")|cli|run|precision)_test\$"
  else
    not_run+=("$architecture")
  fi
done
[[ ${#not_run[@]} -eq 0 ]] || echo "architectures: built, but not tested, because not for this processor: ${not_run[*]}"
