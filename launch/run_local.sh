#!/usr/bin/env bash
# Runs a command as N ranks on this machine: launch/run_local.sh 2 build/release/upmoe train configs/quickstart/moe.yaml
# The program shares the cores out among its ranks (OMP_NUM_THREADS overrides); more ranks than cores are slow.
# To a training run SIGTERM, Ctrl-C and a closed terminal mean: save and end with status 75, within --grace SECONDS
# (120); a second one ends it at once. SIGUSR1 (save) and SIGUSR2 (save and stop) go to the ranks. It ends with the
# status of the ranks, and with 2 where it could not start them.
# shellcheck disable=SC2034,SC2154  # variables shared with supervise.sh
set -euo pipefail

usage() {
  echo "usage: launch/run_local.sh [--grace SECONDS] RANKS COMMAND [ARGUMENT...]"
  sed -n '2,/^# shellcheck/{/^# shellcheck/d; s/^# //; p}' "${BASH_SOURCE[0]}"
}
say() { echo "$([[ -t 2 ]] || date '+%FT%T%:z ')run_local: $*" >&2 || true; }  # in a file a line has a time

wrong() { say "$1"; usage >&2; exit 2; }

stop_grace=120
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; exit 0; fi
if [[ ${1:-} == --grace ]]; then
  [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || wrong "--grace '${2:-}': expected a number of seconds"
  stop_grace=$2
  shift 2
fi
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || wrong "'${1:-}': expected the number of ranks"
[[ $# -ge 2 ]] || wrong "the command is missing"
ranks=$1
shift
command -v mpirun >/dev/null || { say "mpirun not found; run launch/setup.sh"; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/restart_rules.sh
source "$here/restart_rules.sh"
# shellcheck source=launch/supervise.sh
source "$here/supervise.sh"
require_program "$1"
is_train "$@" || stop_grace=0

# Unbound: Open MPI would pin both ranks of two to one core each and their threads with them. Oversubscribed is allowed
# always, because what Open MPI counts as a slot and what a container grants differ.
options=(-np "$ranks" --bind-to none --oversubscribe)
prepare_mpi

start_mpirun "${options[@]}" "$@"
while alive; do
  if ((stopping == 0)); then
    wait "$mpirun_pid" || true  # a signal ends this wait at once and runs its trap
    continue
  fi
  sleep 0.2 &
  wait $! || true
  end_when_due
done
status=0
wait "$mpirun_pid" || status=$?
if ((status > 128)); then say "ended with status $status: $(describe_status "$status")"; fi
exit "$status"
