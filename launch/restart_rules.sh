# shellcheck shell=bash
# When a job that ended is started again. Sourced by launch/run_hosts.sh and launch/run_slurm.sbatch; pure functions.

# Number of the newest checkpoint of a run directory; -1 without one. Whether it is complete, the program finds out.
newest_step() {
  local newest=-1 path name
  for path in "$1"/checkpoints/step_*; do
    name=${path##*/step_}
    [[ -d $path && $name =~ ^[0-9]+$ ]] || continue
    ((10#$name > newest)) && newest=$((10#$name))
  done
  echo "$newest"
}

# restart_verdict STATUS STEP_BEFORE STEP_AFTER FUTILE: prints `again`, or why not. FUTILE counts the starts before
# this one that reached no new checkpoint.
restart_verdict() {
  local status=$1 before=$2 after=$3 futile=$4
  case $status in
    0) echo "done" ;;
    2) echo "the command or its configuration is wrong; another start would end alike" ;;
    3) echo "an input is bad; another start would end alike" ;;
    4) echo "the loss is not finite; another start would end alike" ;;
    75) echo "it was asked to stop and saved; start the same command to go on" ;;
    1) if ((after > before)); then echo again; else echo "it failed before a new checkpoint"; fi ;;
    *)  # a hang, a dead rank, a signal, a lost host
      if ((after > before || futile < 2)); then
        echo again
      else
        echo "three starts in a row reached no new checkpoint"
      fi
      ;;
  esac
}

# Waits for a child of this shell and returns its status. A trapped signal ends `wait`, not the child, and looks
# like a death by that signal: so it is asked once more.
wait_for() {
  local status=0 again=0
  wait "$1" || status=$?
  while ((status > 128)) && kill -0 "$1" 2>/dev/null; do
    status=0
    wait "$1" || status=$?
  done
  if ((status > 128)); then
    wait "$1" 2>/dev/null || again=$?
    [[ $again -eq 127 ]] || status=$again  # 127: the first answer was the child's own
  fi
  return "$status"
}

# The run directory that a command trains in: its run.dir=... override, else the configuration's.
run_dir_of() {
  local word dir='' file=''
  for word in "$@"; do
    [[ $word == run.dir=* ]] && dir=${word#run.dir=}
    [[ $word == *.yaml || $word == *.yml ]] && file=$word
  done
  if [[ -z $dir && -f $file ]]; then
    dir=$(sed -nE 's/^run:.*[{ ,]dir: *([^ ,}]+).*/\1/p; /^run: *$/,/^[^ ]/ s/^ +dir: *([^ #]+).*/\1/p' "$file" |
      head -n 1)
  fi
  [[ -n $dir ]] || return 1
  echo "${dir//[\"\']/}"
}
