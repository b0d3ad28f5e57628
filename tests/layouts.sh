#!/usr/bin/env bash
# The whole of layout equivalence: every mesh of up to 8 ranks and a hundred of 16 over threads, 60 pairs of save and
# resume, and meshes of 2 to 8 ranks over MPI. By hand: ./launch/test.sh runs a sample.
# usage: tests/layouts.sh [BIN_DIR]
set -euo pipefail
usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; exit 2 ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=${1:-$root/build/release/bin}
export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
summary() { grep -E '^\[  (PASSED|FAILED)|tests ran|Failure|over MPI' || true; }

echo "every mesh of up to 8 ranks, a hundred of 16, golden files, features (threads)"
UPMOE_LAYOUTS=all "$bin/layout_equivalence_test" --gtest_color=no | summary
echo "60 pairs of meshes: save under one, resume under the other"
"$bin/layout_resume_test" --gtest_color=no | summary
for ranks in 2 3 4 5 6 7 8; do
  echo "MPI, $ranks ranks"
  mpirun --oversubscribe --bind-to none -np "$ranks" "$bin/layout_equivalence_test" | summary
done
