#!/usr/bin/env bash
# Set-up killed at random moments and started again, on a bare Debian 12 (tests/fresh_machine.sh): as root, kill -9 and
# Ctrl-C in turn to the whole process group, until it has been cut off as often as asked; then it must end well, and
# everything must be whole: packages, Python environment, program.
#
#   tests/setup_interrupted.sh [--times N] [--seed N] [--within SECONDS]     default: 10 times, seed 1, within 180 s
#
# Moments are uniform within the given time of each start, which is why the first ones meet apt and the later ones the
# compiler. By hand: it takes as long as a few set-ups. Needs root and debootstrap.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
say() { echo "setup_interrupted: $*"; }
times=10 seed=1 within=180 inside=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --times | --seed | --within)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { say "$1 '${2:-}': expected a number, at least 1" >&2; usage >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2 ;;
    --inside) inside=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) say "unknown option '$1'" >&2; usage >&2; exit 2 ;;
  esac
done
if [[ $inside -eq 0 ]]; then
  exec "$root/tests/fresh_machine.sh" --as root tests/setup_interrupted.sh --inside --times "$times" --seed "$seed" \
    --within "$within"
fi

failed() { say "FAILED: $*"; tail -n 20 "$root"/build/apt.log "$root"/build/release/*.log 2>/dev/null; exit 1; }
stage() {  # what set-up was at
  tail -n 1 "$1" | cut -c 1-60
}

RANDOM=$seed
cut=0
log=$(mktemp)
while [[ $cut -lt $times ]]; do
  moment=$((RANDOM % within)).$((RANDOM % 1000))
  signal=KILL
  [[ $((cut % 2)) -eq 0 ]] || signal=INT
  # A process group of its own, as a terminal gives one, and SIGINT not ignored, as a script's background jobs have it.
  setsid env --default-signal=INT ./launch/setup.sh --program-only >"$log" 2>&1 &
  group=$!
  status=0
  timeout "$moment" tail --pid="$group" -f /dev/null || status=$?
  if [[ $status -eq 0 ]]; then
    wait "$group" || status=$?
    [[ $status -eq 0 ]] || { cat "$log"; failed "set-up after $cut cuts ended with $status"; }
    say "set-up was over before its cut; started from the program on"
    rm -rf build/release
    continue
  fi
  kill -"$signal" -- "-$group"
  wait "$group" || true
  cut=$((cut + 1))
  say "cut $cut ($signal after $moment s): $(stage "$log")"
done
./launch/setup.sh --program-only || failed "set-up after $cut cuts ended with $?"
[[ -z $(dpkg --audit) ]] || failed "dpkg is not whole: $(dpkg --audit)"
.venv/bin/python -c 'import h5py, matplotlib, numpy, tokenizers' || failed "the Python environment is not whole"
.venv/bin/python -m pip check >/dev/null || failed "pip check"
build/release/upmoe --help >/dev/null || failed "the program does not run"
ninja -C build/release -n upmoe | grep -q 'no work to do' || failed "ninja still finds work"
./launch/quickstart.sh --brief --fresh --check >"$log" 2>&1 || { tail -n 30 "$log"; failed "quickstart.sh --brief"; }
say "ok after $cut cuts"
