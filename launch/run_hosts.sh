#!/usr/bin/env bash
# Trains over several hosts and starts again after faults:
#   launch/run_hosts.sh --hostfile hosts build/release/upmoe train run.yaml parallel.ep=16
# The hostfile has a line per host, "node1 slots=8": names, not addresses. It is read anew at every start, so a host
# that is lost can be taken out of it. The project folder, the data and run.dir must be on a shared file system.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/run_hosts.sh --hostfile FILE [options] COMMAND [ARGUMENT...]
  --ranks-per-host N   ranks on each host (default: the slots of its line)
  --threads N          OMP_NUM_THREADS of each rank (default: this host's cores shared out)
  --interface IF|CIDR  the network between the hosts, e.g. eth0 or 10.0.0.0/24 (default: Open MPI chooses)
  --deadline SECONDS   a job without progress for so long ends with status 70 (default: 600)
  --restarts N         at most N starts after the first (default: 10)
  --run-dir DIR        where the checkpoints are (default: run.dir of the command)
  --mpirun ARGUMENT    handed on to mpirun; may be repeated
USAGE
}
die() {
  echo "run_hosts: $*" >&2
  exit 2
}

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/restart_rules.sh
source "$here/restart_rules.sh"

hostfile='' per_host='' threads='' interface='' deadline=600 restarts=10 run_dir='' extra=()
while [[ $# -gt 0 && $1 == --* ]]; do
  [[ $1 == --help ]] && { usage; exit 0; }
  [[ $# -ge 2 ]] || { usage >&2; exit 2; }
  case $1 in
    --hostfile) hostfile=$2 ;;
    --ranks-per-host) per_host=$2 ;;
    --threads) threads=$2 ;;
    --interface) interface=$2 ;;
    --deadline) deadline=$2 ;;
    --restarts) restarts=$2 ;;
    --run-dir) run_dir=$2 ;;
    --mpirun) extra+=("$2") ;;
    *) usage >&2; die "unknown option '$1'" ;;
  esac
  shift 2
done
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
[[ -r $hostfile ]] || die "--hostfile: '$hostfile' cannot be read"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts: found '$restarts', expected a number"
[[ $deadline =~ ^[0-9]+$ ]] || die "--deadline: found '$deadline', expected a number of seconds"
command -v mpirun >/dev/null || die "mpirun not found; run launch/setup.sh"
[[ -n $run_dir ]] || run_dir=$(run_dir_of "$@") || die "no run.dir in the command or its YAML file; give --run-dir"

# Lines that count, and their slots (1 where none are named).
hosts() { sed -E 's/#.*//; /^[[:space:]]*$/d' "$hostfile"; }
slots() {
  if [[ -n $per_host ]]; then
    echo $(($(hosts | wc -l) * per_host))
  else
    hosts | sed -E 's/.*slots=([0-9]+).*/\1/; t; s/.*/1/' | awk '{ n += $1 } END { print n + 0 }'
  fi
}

start_once() {
  local ranks most
  ranks=$(slots)
  ((ranks > 0)) || die "$hostfile names no host"
  most=${per_host:-$(hosts | sed -E 's/.*slots=([0-9]+).*/\1/; t; s/.*/1/' | sort -n | tail -n 1)}
  local each=${threads:-$(($(nproc) / most > 0 ? $(nproc) / most : 1))}
  # Keep-alives between the daemons: a host that falls silent would else keep mpirun waiting for many minutes.
  local options=(-np "$ranks" --hostfile "$hostfile" --bind-to none -x "OMP_NUM_THREADS=$each"
    --mca oob_tcp_keepalive_time 4 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 3)
  [[ -z $per_host ]] || options+=(--map-by "ppr:$per_host:node" --oversubscribe)
  if [[ -n $interface ]]; then
    options+=(--mca btl_tcp_if_include "$interface" --mca oob_tcp_if_include "$interface")
  fi
  if [[ $(id -u) -eq 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
  local command=("$@")
  [[ ${2:-} == train ]] && command+=(--deadline "$deadline")
  echo "run_hosts: $ranks ranks on $(hosts | wc -l) hosts, $each threads each" >&2
  # In the background, so that signals to this script reach mpirun at once; it hands them to the ranks.
  mpirun "${options[@]}" "${extra[@]}" "${command[@]}" &
  child=$!
  wait_for "$child"
}

child=0
for signal in USR1 USR2 TERM INT; do
  # shellcheck disable=SC2064  # the name of this signal
  trap "((child > 0)) && kill -$signal \$child 2>/dev/null || true" "$signal"
done

futile=0
for ((start = 0; ; ++start)); do
  before=$(newest_step "$run_dir")
  status=0
  start_once "$@" || status=$?
  after=$(newest_step "$run_dir")
  verdict=$(restart_verdict "$status" "$before" "$after" "$futile")
  if ((after > before)); then futile=0; else futile=$((futile + 1)); fi
  if [[ $verdict != again ]]; then
    [[ $status -eq 0 ]] || echo "run_hosts: status $status: $verdict" >&2
    exit "$status"
  fi
  if ((start >= restarts)); then
    echo "run_hosts: status $status after $restarts restarts; newest checkpoint: step $after" >&2
    exit "$status"
  fi
  echo "run_hosts: status $status; starting again from step $after (restart $((start + 1)) of $restarts)." \
    "A host that is lost has to be taken out of $hostfile" >&2
done
