#!/usr/bin/env bash
# Slurm itself, with two nodes here, and launch/run_slurm.sbatch under it: a run that ends, one that is asked
# for a checkpoint, one near its time limit, one preempted, one cancelled, one of which a rank is killed,
# and what is said of a start without PMIx. Debian's packages of Slurm are taken from apt and unpacked, not installed.
#
#   tests/slurm.sh [--build FOLDER]     default: build/release, which has upmoe and bin/make_run
#
# By hand and as root, because it makes namespaces and lays Slurm over /usr within them; not part of the test suite.
# Takes a minute. All it makes ends with its first process.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tests/support/wait_until.sh"
usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
die() { echo "slurm: error: $*" >&2; exit 2; }
build=$root/build/release inside=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --build) [[ $# -ge 2 ]] || { usage >&2; exit 2; }; build=$(realpath "$2"); shift 2 ;;
    --inside) inside=$2; shift 2 ;;  # its own, within the namespaces
    -h | --help) usage; exit 0 ;;
    *) usage >&2; die "unknown option '$1'" ;;
  esac
done
upmoe=$build/upmoe
[[ -x $upmoe && -x $build/bin/make_run ]] || die "no program in $build; run launch/setup.sh or give --build"
[[ $(id -u) -eq 0 ]] || die "making namespaces needs root"

if [[ -z $inside ]]; then
  work=$(mktemp -d /tmp/upmoe-slurm-XXXX)
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/packages"
  (cd "$work/packages" && apt-get download slurmctld slurmd slurm-client slurm-wlm-basic-plugins libmunge2) \
    >/dev/null 2>&1 || die "apt-get download found no Slurm; run apt-get update"
  for package in "$work"/packages/*.deb; do dpkg-deb --extract "$package" "$work/packages"; done
  unshare --mount --pid --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" --build "$build" --inside "$work"
  exit 0
fi
work=$inside

start_slurm() {
  local name node
  for name in slurmctld slurmd slurmstepd; do ln -sf "$name-wlm" "$work/packages/usr/sbin/$name"; done
  mount -t overlay overlay -o lowerdir="$work/packages/usr:/usr" /usr
  mkdir "$work/state"
  for node in n1 n2; do mkdir -p "$work/spool/$node" "$work/tmp/$node"; done
  export SLURM_CONF=$work/slurm.conf
  cat >"$SLURM_CONF" <<CONF
ClusterName=trial
SlurmctldHost=$(hostname)
SlurmctldPort=26817
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPidFile=$work/state/slurmctld.pid
SlurmdPidFile=$work/state/%n.pid
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
TmpFS=$work/tmp/%n
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/%n.log
SchedulerParameters=sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[27001-27002] CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
CONF
  slurmctld -c
  for node in n1 n2; do slurmd -N "$node"; done
  wait_until 20 "two nodes" nodes_are idle
}

failed() { echo "slurm: FAILED: $*"; tail -n 40 "$work"/*.out; exit 1; }
nodes_are() { [[ $(sinfo -h -N -p low -o %T | sort -u) == "$1" ]]; }
said() { grep -q -- "$2" "$work/$1.out" 2>/dev/null; }  # RUN WORDS
state() { scontrol show job "$job" | grep -o 'JobState=[A-Z_]*'; }
is() { [[ $(state) == "JobState=$1" ]]; }

submit() {  # RUN STEPS OPTION...; sets job
  wait_until 60 "$1: free nodes" nodes_are idle
  job=$(UPMOE_ROOT=$root UPMOE_RESTART_DELAY=1 sbatch --parsable -N2 --ntasks-per-node=1 --cpus-per-task=1 \
    --output="$work/$1.out" "${@:3}" "$root/launch/run_slurm.sbatch" \
    "$upmoe" train "$work/run.yaml" run.dir="$work/$1" train.steps="$2" checkpoint.every=100000 log.every=10)
  [[ $2 -lt 1000 ]] || wait_until 40 "$1: its first steps" said "$1" 'step 1/'
}
requeued() {  # RUN: then it would wait for two minutes
  wait_until 30 "$1: the queue" said "$1" 'back into the queue'
  wait_until 30 "$1: the queue" is PENDING
  said "$1" 'stopped on request after step' || failed "$1: not saved"
  scancel "$job"
}

start_slurm
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
"$build/bin/make_run" "$work" >/dev/null
long=1000000

submit ends 20
wait_until 60 "a run that ends" is COMPLETED
said ends 'run_slurm: srun ended with status 0' || failed "ends: its words"
echo "slurm: a run ends, and its job with it"

submit asked "$long"
scancel --signal=USR1 "$job"
wait_until 20 "asked: a checkpoint" said asked 'checkpoint .*step_'
is RUNNING || failed "asked: it is $(state)"
scancel --signal=USR2 "$job"
wait_until 20 "asked: its end" is FAILED
said asked 'no restart: it was asked to stop' || failed "asked: its words"
echo "slurm: USR1 saves and goes on, USR2 saves and ends the job"

submit limit "$long"
scancel --batch --signal=USR1 "$job"  # what --signal=B:USR1@180 does
requeued limit
echo "slurm: near its time limit a run is saved, its job goes back into the queue"

submit preempted "$long"
sbatch -N2 -p high --output=/dev/null --wrap 'sleep 2' >/dev/null
requeued preempted
echo "slurm: so it is where the job is preempted"

submit cancelled "$long"
scancel "$job"
wait_until 20 "cancelled: its words" said cancelled 'srun ended with status 75'
wait_until 30 "cancelled: its state" is CANCELLED
echo "slurm: a cancelled run is saved"

submit killed "$long"
kill -KILL "$(pgrep -n -f "^$upmoe train .*run.dir=$work/killed ")"
wait_until 60 "killed: a restart" said killed 'restart 1 of 3'
wait_until 30 "killed: its first steps" said killed 'start 2'
scancel "$job"
echo "slurm: a killed rank ends the others, and the run is started again"

wait_until 60 "free nodes" nodes_are idle
srun -N2 -n2 "$upmoe" train "$work/run.yaml" run.dir="$work/bare" >"$work/bare.out" 2>&1 && failed "bare: status 0"
[[ $(grep -c "by 'none', and Open MPI wants PMIx" "$work/bare.out") -eq 1 ]] || failed "bare: its words"
echo "slurm: srun without PMIx is told by one line"
echo "slurm: ok"
