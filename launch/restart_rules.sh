# shellcheck shell=bash
# What the launch scripts know about statuses, checkpoints and restarts; sourced by run_local.sh, run_hosts.sh
# and run_slurm.sbatch.
# Functions only: they print their answer and change nothing, so tests/launch/restart_test.py can ask each of them.

# newest_step RUN_DIR: the step of the newest complete checkpoint, -1 when there is none. A folder under its final name
# is complete; step_*.tmp is not.
newest_step() {
  local newest=-1 path name
  for path in "$1"/checkpoints/step_*; do
    name=${path##*/}
    [[ -d $path && $name =~ ^step_([0-9]{8}|[1-9][0-9]{8,})$ ]] || continue
    ((10#${BASH_REMATCH[1]} > newest)) && newest=$((10#${BASH_REMATCH[1]}))
  done
  echo "$newest"
}

# is_train COMMAND...: whether the command is a training run, the only one that can be resumed.
is_train() {
  local word
  for word in "$@"; do [[ $word == train ]] && return 0; done
  return 1
}

# dir_in_yaml FILE: run.dir as `run: {dir: X}` or as a block; empty when the file says it in another way.
dir_in_yaml() {
  awk '
    function answer(text) {
      sub(/^[[:space:]]*/, "", text)
      if (text ~ /^"/) { sub(/^"/, "", text); sub(/".*/, "", text) }
      else if (text ~ /^\047/) { sub(/^\047/, "", text); sub(/\047.*/, "", text) }
      else { sub(/[[:space:]]#.*/, "", text); if (flow) sub(/[,}].*/, "", text); sub(/[[:space:]]+$/, "", text) }
      print text
      exit
    }
    /^[^[:space:]#]/ { inside = 0 }
    /^run[[:space:]]*:/ {
      inside = 1
      flow = /[{]/
      if (match($0, /[{,][[:space:]]*dir[[:space:]]*:/)) answer(substr($0, RSTART + RLENGTH))
      next
    }
    inside && match($0, /^[[:space:]{]*dir[[:space:]]*:/) { answer(substr($0, RSTART + RLENGTH)) }
  ' "$1"
}

# expand_path TEXT: ~ and variables as the program reads them in paths (configs/path_text.cpp): `$NAME` and `${NAME}`
# have a value, `$$` is a dollar sign. Fails where the program would.
expand_path() {
  local rest=$1 path=''
  # shellcheck disable=SC2088  # the text itself, which no shell has expanded
  if [[ $rest == '~' || $rest == '~/'* ]]; then
    [[ -n ${HOME:-} ]] || return 1
    path=$HOME rest=${rest:1}
  elif [[ $rest == '~'* ]]; then
    return 1
  fi
  while [[ $rest =~ ^([^$]*)\$(\$|[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})(.*)$ ]]; do
    local before=${BASH_REMATCH[1]} name=${BASH_REMATCH[2]} value='$'
    rest=${BASH_REMATCH[3]}
    if [[ $name != '$' ]]; then
      name=${name#\{} name=${name%\}}
      value=${!name:-}
      [[ -n $value ]] || return 1
    fi
    path+=$before$value
  done
  [[ $rest != *'$'* ]] || return 1
  echo "$path$rest"
}

# run_dir_of COMMAND...: the run directory of a training command; the last run.dir= counts, then the YAML file.
run_dir_of() {
  local word file='' dir='' seen_train=0
  for word in "$@"; do
    case $word in
      train) seen_train=1 ;;
      run.dir=*) dir=${word#run.dir=} ;;
      *.yaml | *.yml) if [[ $seen_train -eq 1 && -z $file && $word != *=* ]]; then file=$word; fi ;;
    esac
  done
  if [[ -z $dir && -n $file && -r $file ]]; then dir=$(dir_in_yaml "$file"); fi
  [[ -n $dir ]] || return 1
  expand_path "$dir"
}

describe_status() {  # STATUS: in words
  case $1 in
    0) echo "done" ;;
    1) echo "unexpected failure, or the launcher could not start the job" ;;
    2) echo "wrong usage or configuration" ;;
    3) echo "bad input" ;;
    4) echo "numeric stop" ;;
    70) echo "no progress within the deadline" ;;
    71) echo "device" ;;
    72) echo "communicator" ;;
    75) echo "stopped on request, checkpoint complete" ;;
    126 | 127) echo "the command cannot be started, on one host at least" ;;
    137) echo "killed by signal 9: out of memory?" ;;
    129 | 1[3-5]? | 16[0-4]) echo "killed by signal $(($1 - 128))" ;;
    *) echo "the launcher gave up, as it does when it loses a host" ;;
  esac
}

# should_restart STATUS OLD NEW START: whether to start the command again, and on standard output why (not).
# OLD and NEW are the newest checkpoints before and after that start, START counts from 1. A first start may fail
# without a checkpoint (a host can die early); a restart that brings none would only repeat itself.
should_restart() {
  local status=$1 old=$2 new=$3 start=$4
  case $status in
    0) echo "nothing is left to do"; return 1 ;;
    2 | 3 | 4) echo "another try would end the same way"; return 1 ;;
    71) echo "a device needs a look before another try"; return 1 ;;
    75) echo "it was asked to stop"; return 1 ;;
    126 | 127) echo "another try would end the same way"; return 1 ;;
  esac
  if ((new > old)); then echo "step $new is saved"; return 0; fi
  if ((status == 1)); then echo "no checkpoint was written since the start"; return 1; fi
  if ((start == 1)); then echo "a first start may fail before its first checkpoint"; return 0; fi
  echo "a restart brought no newer checkpoint"
  return 1
}

# should_requeue STATUS OLD NEW: whether a job that was told of its time limit goes back into the queue.
should_requeue() {
  local status=$1 old=$2 new=$3
  if ((status == 0)); then echo "nothing is left to do"; return 1; fi
  if ((status == 2 || status == 3 || status == 4 || status == 71 || status == 126 || status == 127)); then
    echo "another try would end the same way"; return 1
  fi
  if ((new > old)); then echo "step $new is saved"; return 0; fi
  echo "no checkpoint was written within the time limit, and another run would write none either"
  return 1
}
