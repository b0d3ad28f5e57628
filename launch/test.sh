#!/usr/bin/env bash
# usage: launch/test.sh [CTEST_OPTIONS]
# Sets up what is missing, then runs every test of the release build. Arguments go to ctest: launch/test.sh -R golden
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ctest passes over words that it does not know, and would run everything.
refuse_unknown_options() {
  command -v ctest >/dev/null || return 0
  local known word
  known=$(ctest --help | grep -oE '(^|[ ,=])--?[A-Za-z][A-Za-z-]*' | tr -d ' ,=')
  for word in "$@"; do
    [[ $word == -* && ! $word =~ ^-j[0-9]+$ ]] || continue
    grep -qxF -e "${word%%=*}" <<<"$known" && continue
    echo "test: ctest has no option '$word'; usage: launch/test.sh [CTEST_OPTIONS]; see ctest --help" >&2
    exit 2
  done
}

case ${1:-} in
  -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
refuse_unknown_options "$@"  # at once where it can be told
"$root/launch/setup.sh"
refuse_unknown_options "$@"
cd "$root"
# Two at a time: most tests use one core, those under mpirun two to four ranks of one thread.
exec ctest --preset release -j "${UPMOE_TEST_JOBS:-2}" "$@"
