#!/usr/bin/env bash
# Starts one job over the hosts of a file and, when it is a training run that failed for a passing reason, starts it
# again; it then resumes from the newest complete checkpoint. What is worth another try: restart_rules.sh.
# shellcheck disable=SC2034,SC2154  # variables shared with supervise.sh
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/run_hosts.sh --hostfile FILE [OPTION...] COMMAND...
  --hostfile FILE       one host a line, as Open MPI reads it (NAME [slots=N], or NAME once for each slot); read again
                        at every start
  --ranks-per-host N    default: the slots= of the file, when all hosts have the same
  --cores-per-host N    physical cores to share out and bind ranks to; default: as many as this host has, if it is in
                        the file; else ranks are not bound, and the program shares out what it finds
  --deadline SECONDS    passed to `upmoe train`: without progress for so long a rank ends the job with 70
  --restarts N          at most so many (default 3; 0: never)
  --delay SECONDS       before a restart (default 10), for hosts and file systems to notice what ended
  --grace SECONDS       for mpirun to end after a rank reported an error, and for a checkpoint after SIGTERM,
                        SIGINT or SIGHUP (default 15 and 120; one value sets both)
  --interface IF|CIDR   network that MPI uses, such as eth0 or 10.0.0.0/24; default: all that Open MPI finds
  --rsh AGENT           starts a command on a host (default: ssh); must ask for no password
  --run-dir DIR         where the checkpoints are, if the command does not tell by run.dir= or its YAML file
  --env NAME            a variable of the environment that all ranks get, can be repeated; NCCL_*, UCX_*, FI_*, OMP_*,
                        GOMP_*, ONEDNN_*, UPMOE_* and those that the command or its YAML file names go without asking
The program, its inputs and the run directory must lie under the same path on all hosts, and this folder be there. More
options of mpirun: in the environment, as OMPI_MCA_name=value. Example:
  launch/run_hosts.sh --hostfile hosts.txt --ranks-per-host 8 --deadline 120 build/release/upmoe train run.yaml
SIGUSR1 and SIGUSR2 go to the ranks; SIGTERM, SIGINT and SIGHUP save and stop, a second one stops at once.
The exit status is that of the last start.
USAGE
}

say() { echo "$([[ -t 2 ]] || date '+%FT%T%:z ')run_hosts: $*" >&2 || true; }  # in a file a line has a time
die() { echo "run_hosts: error: $*" >&2; exit 2; }

hostfile='' ranks='' cores='' deadline='' restarts=3 delay=10 abort_grace=15 stop_grace=120 interface='' rsh=''
run_dir='' env_names=''
number() {  # OPTION VALUE SMALLEST
  if [[ ! $2 =~ ^[0-9]+$ ]] || ((10#$2 < $3)); then die "$1 '$2': expected a whole number from $3 on"; fi
}
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --*) [[ $# -ge 2 ]] || { usage >&2; die "$1 needs a value"; } ;;
    *) break ;;
  esac
  case $1 in
    --hostfile) hostfile=$2 ;;
    --ranks-per-host) number "$1" "$2" 1; ranks=$2 ;;
    --cores-per-host) number "$1" "$2" 1; cores=$2 ;;
    --deadline) number "$1" "$2" 1; deadline=$2 ;;
    --restarts) number "$1" "$2" 0; restarts=$2 ;;
    --delay) number "$1" "$2" 0; delay=$2 ;;
    --grace) number "$1" "$2" 1; abort_grace=$2 stop_grace=$2 ;;
    --interface) interface=$2 ;;
    --rsh) rsh=$2 ;;
    --run-dir) run_dir=$2 ;;
    --env)
      [[ -n $2 && " $(compgen -e | tr '\n' ' ') " == *" $2 "* ]] || die "--env '$2': no such variable is exported here"
      env_names+=" $2"
      ;;
    *) usage >&2; die "unknown option '$1'" ;;
  esac
  shift 2
done
command=("$@")
[[ -n $hostfile ]] || { usage >&2; die "--hostfile is missing"; }
[[ ${#command[@]} -gt 0 ]] || { usage >&2; die "no command to start"; }
command -v mpirun >/dev/null || die "mpirun not found; run launch/setup.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/restart_rules.sh
source "$here/restart_rules.sh"
# shellcheck source=launch/supervise.sh
source "$here/supervise.sh"

require_program "${command[0]}"
if is_train "${command[@]}"; then
  [[ -n $run_dir ]] || run_dir=$(run_dir_of "${command[@]}") || [[ $restarts -eq 0 ]] ||
    die "no run directory found in '${command[*]}', or one of an unset variable; give --run-dir, or --restarts 0"
else
  stop_grace=0  # it saves nothing when asked to stop
  [[ -z $deadline ]] || die "--deadline is for 'upmoe train', which is not in '${command[*]}'"
  restarts=0
fi
if [[ -n $deadline ]]; then
  with_deadline=() option=(--deadline "$deadline")
  for word in "${command[@]}"; do
    [[ $word != --deadline* ]] || die "the deadline is given twice: before the command and in it"
    with_deadline+=("$word")
    if [[ $word == train ]]; then with_deadline+=("${option[@]}"); option=(); fi
  done
  command=("${with_deadline[@]}")
fi

hosts=()
# As Open MPI reads it: a host that has several lines has as many slots, unless they say slots=.
read_hosts() {
  [[ -f $hostfile && -r $hostfile ]] || die "--hostfile $hostfile: cannot be read"
  local line host found=0 slots=''
  local -A slots_of=() said=()
  hosts=()
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line%%#*} line=${line%$'\r'}
    read -r host _ <<<"$line"
    [[ -n $host ]] || continue
    [[ $host =~ ^[][A-Za-z0-9._:%@+-]+$ && $host != -* ]] ||
      die "--hostfile $hostfile: $(printf %q "$host") is no name or address of a host"
    [[ ! $host =~ ^([^:]+):([0-9]*)$ ]] ||
      die "--hostfile $hostfile: $host: Open MPI wants '${BASH_REMATCH[1]} slots=${BASH_REMATCH[2]:-N}'"
    found=''
    if [[ $line =~ [[:space:]]slots[[:space:]]*=[[:space:]]*([^[:space:]]*) ]]; then
      found=${BASH_REMATCH[1]}
      [[ $found =~ ^0*[1-9][0-9]{0,4}$ ]] ||
        die "--hostfile $hostfile: $host has slots=$(printf %q "$found"), expected a number from 1 to 99999"
      found=$((10#$found))
    fi
    if [[ -z ${slots_of[h$host]:-} ]]; then
      hosts+=("$host")
      slots_of[h$host]=${found:-1} said[h$host]=$found  # h: of a host '@' bash would take all
    else
      [[ -z $found && -z ${said[h$host]} ]] ||
        die "--hostfile $hostfile: $host stands there twice; one line with all its slots=, or lines without"
      found=${slots_of[h$host]}
      slots_of[h$host]=$((found + 1))
    fi
  done < <(LC_ALL=C tr -d '\0' <"$hostfile")
  [[ ${#hosts[@]} -gt 0 ]] || die "--hostfile $hostfile: names no host"
  for host in "${hosts[@]}"; do
    found=${slots_of[h$host]}
    [[ -n $ranks || -z $slots || $slots -eq $found ]] ||
      die "--hostfile $hostfile: $host has $found slots, the hosts before it $slots; give --ranks-per-host"
    slots=$found
  done
  per_host=${ranks:-$slots}
}

physical_cores() {  # that this process may use; hardware threads of one core count once, as Open MPI binds to cores
  local physical allowed
  allowed=$(nproc)
  physical=$(lscpu --parse=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l) || physical=0
  echo $((physical > 0 && physical < allowed ? physical : allowed))
}
# A login node, which often has other cores than the hosts that it starts.
is_in_file() {
  local host here addresses
  here=$(uname -n) addresses=$(hostname -I 2>/dev/null || true)
  for host in "${hosts[@]}"; do
    case $host in localhost | 127.0.0.1 | ::1) return 0 ;; esac
    [[ ${host%%.*} != "${here%%.*}" && " $addresses " != *" $host "* ]] || return 0
  done
  return 1
}

# Another host's shell knows nothing of this environment, and a rank there would find other settings, or none. Prints
# mpirun's options for what all ranks get of it.
environment_options() {
  local word name named
  named=" $(for word in "${command[@]}"; do
    printf '%s\n' "$word"
    if [[ $word == *.y*ml && -f $word && -r $word ]]; then cat "$word"; fi
  done | { grep -aoE '[$][{]?[A-Za-z_][A-Za-z0-9_]*' || true; } | tr -d '${' | tr '\n' ' ') $env_names "
  for name in $(compgen -e); do
    case $name in
      NCCL_* | UCX_* | FI_* | OMP_* | GOMP_* | ONEDNN_* | UPMOE_*) ;;
      *) [[ $named == *" $name "* ]] || continue ;;
    esac
    echo "-x $name"
  done
}

threads=${OMP_NUM_THREADS:-}
make_options() {
  local total=$((${#hosts[@]} * per_host)) known=$cores share=''
  if [[ -z $known ]] && is_in_file; then known=$(physical_cores); fi
  if [[ -n $known ]]; then share=$((known / per_host > 0 ? known / per_host : 1)); fi
  # Slots are overruled: what counts is --ranks-per-host.
  options=(--hostfile "$hostfile" -np "$total" --oversubscribe)
  if [[ -n $known ]] && ((per_host <= known)); then
    options+=(--map-by "ppr:$per_host:node:PE=$share" --bind-to core)
  else
    options+=(--map-by "ppr:$per_host:node" --bind-to none)
  fi
  unset OMP_NUM_THREADS  # of an earlier start
  if [[ -n $threads$share ]]; then export OMP_NUM_THREADS=${threads:-$share}; fi
  options+=(-wdir "$PWD")  # else a host without this folder would begin in another one, without a word
  # shellcheck disable=SC2207  # two words a line
  options+=($(environment_options))
  # Open MPI's own: 300 + 9 x 20 s until it misses a silent host. These notice one after about 25 s.
  options+=(--mca oob_tcp_keepalive_time 10 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 3)
  [[ -z $interface ]] || options+=(--mca btl_tcp_if_include "$interface" --mca oob_tcp_if_include "$interface")
  [[ -z $rsh ]] || options+=(--mca plm_rsh_agent "$rsh")
}
prepare_mpi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Passes mpirun's standard error on and leaves marks: at the first line by which a rank ends the job, from which on
# mpirun has little time, because it waits without end for the daemon of a host that cannot be reached; and where mpirun
# could not start the program on some host, as it then ends with a status that looks like a signal's.
watch_errors() {
  local line
  trap '' TERM INT HUP USR1 USR2
  while IFS= read -r line; do
    printf '%s\n' "$line" >&2 || true
    [[ $line != *'upmoe: error:'* ]] || : >"$scratch/error"
    [[ $line != 'mpirun was unable to '*' the specified application as it '* ]] || : >"$scratch/not_started"
  done
}

start_once() {  # sets status
  local error_by=0 killed=0 watcher
  rm -f "$scratch/error" "$scratch/errors" "$scratch/not_started"
  mkfifo "$scratch/errors"
  watch_errors <"$scratch/errors" &
  watcher=$!
  kill_by=-1
  start_mpirun "${options[@]}" "${command[@]}" 2>"$scratch/errors"
  while alive; do
    sleep 0.2 &
    wait $! || true  # a signal ends this wait at once and runs its trap
    if ((kill_by >= 0 && SECONDS >= kill_by)); then killed=1; fi
    end_when_due
    if [[ $error_by -eq 0 && $killed -eq 0 && -e $scratch/error ]]; then error_by=$((SECONDS + abort_grace)); fi
    if [[ $error_by -ne 0 && $SECONDS -ge $error_by ]]; then
      say "mpirun did not end within $abort_grace s of the error above, so it has lost a host; killing it"
      killed=1 error_by=0
      end_mpirun TERM
      kill_by=$((SECONDS + 2))
    fi
  done
  status=0
  wait "$mpirun_pid" || status=$?
  # Of a rank that only reported the silence of another host, mpirun never told the status.
  if [[ $killed -eq 1 ]]; then status=72; fi
  mpirun_pid=0
  # The last lines; what is left of mpirun can hold the pipe open, so this does not wait for its end.
  for _ in {1..20}; do kill -0 "$watcher" 2>/dev/null || break; sleep 0.05; done
  kill "$watcher" 2>/dev/null || true
  if [[ -e $scratch/not_started ]]; then status=127; fi
}

status=0
for ((start = 1; ; ++start)); do
  read_hosts
  make_options
  old=-1
  [[ -z $run_dir ]] || old=$(newest_step "$run_dir")
  say "start $start: ${#hosts[@]} hosts with $per_host ranks${OMP_NUM_THREADS:+, $OMP_NUM_THREADS threads each}" \
    "$( ((old < 0)) || echo "(newest checkpoint: step $old)")"
  began=$SECONDS
  start_once
  [[ $status -ne 0 ]] || exit 0
  new=-1
  [[ -z $run_dir ]] || new=$(newest_step "$run_dir")
  what="ended after $((SECONDS - began)) s with status $status ($(describe_status "$status"))"
  if [[ $stopping -eq 1 ]]; then say "$what; it was asked to stop"; exit "$status"; fi
  if ((restarts == 0)); then say "$what"; exit "$status"; fi
  if ! why=$(should_restart "$status" "$old" "$new" "$start"); then
    say "$what; no restart: $why"
    ((start == 1 || status == 127)) || say "if a host of $hostfile is down, take it out of the file and start again"
    exit "$status"
  fi
  if ((start > restarts)); then say "$what; no restart: all $restarts are used up"; exit "$status"; fi
  say "$what; $why: restart $start of $restarts in $delay s"
  say "$hostfile is read again then; take out a host that stays down (the number of ranks must suit the run)"
  waited=$((SECONDS + delay))
  while [[ $SECONDS -lt $waited && $stopping -eq 0 ]]; do sleep 0.2; done
  if [[ $stopping -eq 1 ]]; then say "asked to stop before the restart"; exit "$status"; fi
done
