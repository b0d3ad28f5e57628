#!/usr/bin/env bash
# Sets up what is missing, then runs every test of the release build. Arguments go to ctest: launch/test.sh -R golden
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh"
cd "$root"
# Two at a time: most tests use one core, those under mpirun two to four ranks of one thread.
exec ctest --preset release -j "${UPMOE_TEST_JOBS:-2}" "$@"
