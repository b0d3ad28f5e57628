#!/usr/bin/env bash
# Several hosts on one machine: three network namespaces joined by a bridge, two ranks in each, a small mixture of
# experts with its experts spread over all of them. Trains it undisturbed, then again with one host lost in the middle:
# cut off (a host that only computes; the one of mpirun and rank 0), switched off, cut off for good. The job must end
# within its deadline and a grace on all hosts, and launch/run_hosts.sh must resume it to the same losses, to the last
# digit, or say what to do when the host stays away. Before that, `upmoe doctor` over the same hosts: one report of all,
# links between them, and a host whose folder is not the others' keeps a run from starting.
#
#   tests/hosts.sh [--binary PATH] [--doctor]     default: build/release/upmoe; --doctor: that part alone
#
# By hand and as root, because it makes network namespaces; not part of the test suite. UPMOE_PYTHON names a Python with
# h5py (default: .venv/bin/python). Takes three to five minutes, doctor's part half a minute. All it makes ends with its
# first process.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HOSTS=3 RANKS_PER_HOST=2 DEADLINE=6 GRACE=6 STEPS=60 CUT_AT=25

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
die() { echo "hosts: error: $*" >&2; exit 2; }
binary=$root/build/release/upmoe inside='' only=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --binary) [[ $# -ge 2 ]] || { usage >&2; exit 2; }; binary=$(realpath "$2"); shift 2 ;;
    --inside) inside=$2; shift 2 ;;  # its own, within the namespaces
    --doctor) only=--doctor; shift ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; die "unknown option '$1'" ;;
  esac
done
python=${UPMOE_PYTHON:-$root/.venv/bin/python}
[[ -x $binary ]] || die "no program at $binary; run launch/setup.sh or give --binary"
[[ $(id -u) -eq 0 ]] || die "making network namespaces needs root"
for tool in ip nsenter unshare mpirun; do command -v "$tool" >/dev/null || die "$tool not found"; done
"$python" -c 'import h5py' 2>/dev/null || die "$python has no h5py; run launch/setup.sh or set UPMOE_PYTHON"

if [[ -z $inside ]]; then
  work=$(mktemp -d /tmp/upmoe-hosts-XXXX)
  trap 'rm -rf "$work" /tmp/ompi.upmoe-node[1-9].*' EXIT
  # shellcheck disable=SC2086  # an option or nothing
  unshare --net --mount --pid --fork --kill-child --mount-proc \
    "${BASH_SOURCE[0]}" --binary "$binary" --inside "$work" $only
  exit 0
fi
work=$inside

# shellcheck source=tests/support/pretended_hosts.sh
source "$root/tests/support/pretended_hosts.sh"
source "$root/tests/support/wait_until.sh"

write_run() {
  mkdir -p "$work/model"
  cat >"$work/model/config.json" <<'JSON'
{"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 64, "intermediate_size": 48,
 "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
 "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
 "hidden_act": "silu", "initializer_range": 0.1, "num_experts": 12, "num_experts_per_tok": 2,
 "moe_intermediate_size": 12, "shared_expert_intermediate_size": 24, "norm_topk_prob": false,
 "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "torch_dtype": "float32"}
JSON
  "$python" - "$work/tokens.h5" <<'PY'
import sys

import h5py
import numpy as np

with h5py.File(sys.argv[1], "w") as f:
    f["tokens"] = np.random.default_rng(1).integers(0, 64, 40000, dtype=np.uint32)
    f["document_ends"] = np.array([40000], dtype=np.int64)
    f.attrs.update({"vocab_size": np.int64(64), "eos_id": np.int64(0), "tokenizer_sha256": "0" * 64,
                    "format": "upmoe-tokens-1"})
PY
  cat >"$work/run.yaml" <<YAML
run: {dir: $work/run, seed: 1}
model: {path: $work/model, init: random}
data: {train: [{path: $work/tokens.h5, weight: 1.0}], seq_len: 32, shuffle: true, seed: 1}
train: {steps: $STEPS, global_batch: 12, micro_batch: 1, precision: fp32}
optimizer: {lr: 1.0e-3}
schedule: {name: constant}
parallel: {ep: 6}
checkpoint: {every: 10, keep: 3}
log: {tensorboard: false}
YAML
}

on_hosts() {  # OPTION... COMMAND...: run_hosts.sh on node 1, as a user would start it
  nsenter --net=/run/netns/upmoe-node1 unshare --uts sh -c 'hostname upmoe-node1; exec "$@"' sh \
    "$root/launch/run_hosts.sh" --hostfile "$work/hostfile" --interface "$NETWORK.0/24" --rsh "$work/agent" "$@"
}

train() {  # RUN: in the background; its words go to RUN.log
  on_hosts --deadline "$DEADLINE" --restarts 3 --delay 3 --grace "$GRACE" \
    "$binary" train "$work/run.yaml" run.dir="$work/$1" >"$work/$1.log" 2>&1 &
  job=$!
}

failed() { echo "hosts: FAILED: $*"; tail -n 60 "$work"/*.log; exit 1; }
now() { date +%s.%N; }
took() { "$python" -c 'import sys; print(f"{float(sys.argv[2]) - float(sys.argv[1]):.1f} s")' "$1" "$(now)"; }
last_step() { grep -o '"step": *[0-9]*' "$work/$1/metrics.jsonl" 2>/dev/null | tail -n 1 | tr -dc 0-9; }
reached() { [[ $(last_step "$1") -ge $2 ]]; }
says() { grep -q -- "$2" "$work/$1.log"; }
ranks_are_gone() { ! pgrep -x upmoe >/dev/null; }

same_losses() {
  "$python" - "$work/$1/metrics.jsonl" "$work/$2/metrics.jsonl" "$STEPS" <<'PY'
import json, sys

def steps(path):
    numbers = [json.loads(line) for line in open(path)]
    return {m["step"]: [m[key] for key in ("loss", "aux_loss", "grad_norm")] for m in numbers if "loss" in m}

whole, resumed = steps(sys.argv[1]), steps(sys.argv[2])
if sorted(whole) != list(range(1, int(sys.argv[3]) + 1)):
    sys.exit(f"the undisturbed run has the steps {sorted(whole)}")
different = [step for step in whole if resumed.get(step) != whole[step]]
if different:
    step = different[0]
    sys.exit(f"{len(different)} steps differ, first {step}: {whole[step]} became {resumed.get(step)}")
PY
}

switch_off() {  # NUMBER of the host: all that runs there, at once
  ip netns pids "upmoe-node$1" | xargs kill -KILL
}

lines_of() { grep -E 'run_hosts: (ended|mpirun|if )|upmoe: error' "$work/$1.log" | cut -c 1-190 | sed 's/^/    /'; }

# RUN HOST WHAT LOSE...: loses HOST by the command LOSE in the middle of the run; sets $ended to the time until the job
# was over on every host.
lose() {
  local run=$1 host=$2 what=$3 lost_at over
  shift 3
  began=$(now)
  train "$run"
  wait_until 90 "step $CUT_AT" reached "$run" "$CUT_AT"
  "$@" "$host"
  lost_at=$(now)
  wait_until $((DEADLINE + 2 * GRACE + 5)) "$what: end of the job" says "$run" 'restart 1 of'
  over=$(took "$lost_at")
  wait_until $((DEADLINE + 5)) "$what: end of all ranks, those of the lost host too" ranks_are_gone
  ended="job over after $over, last rank of any host gone after $(took "$lost_at")"
}

comes_back() {  # as lose; then HOST is there again before the restart
  lose "$@"
  local back_at
  back_at=$(now)
  cable up "$2"
  wait "$job" || failed "$1: run_hosts.sh ended with $?"
  same_losses whole "$1" || failed "$1: losses"
  echo "$3 at step $CUT_AT: $ended, resumed and done $(took "$back_at") later, $(took "$began") in all;" \
    "losses of all $STEPS steps bitwise equal"
  lines_of "$1"
}

stays_away() {
  lose "$@"
  local status=0
  wait "$job" || status=$?
  cable up "$2"
  [[ $status -ne 0 ]] || failed "$1: run_hosts.sh says all is well"
  says "$1" "did not finish: nothing yet from rank .*(on .*upmoe-node$2[,)]" || failed "$1: the host is not named"
  says "$1" 'take it out of the file' || failed "$1: no word on the host that is down"
  echo "$3 at step $CUT_AT: $ended, given up with status $status, $(took "$began") in all"
  lines_of "$1"
}

# On host 3 as another program would see it whose disk is its own: $work/shared is an empty one there.
write_apart() {
  cat >"$work/apart" <<APART
#!/bin/sh
[ "\$(hostname)" = upmoe-node3 ] || exec "$binary" "\$@"
exec unshare --mount sh -c 'mount -t tmpfs tmpfs "$work/shared" && exec "\$0" "\$@"' "$binary" "\$@"
APART
  chmod +x "$work/apart"
}

# NAME STATUS PROGRAM ARGUMENT...: doctor's report goes to NAME.out, all else to NAME.log.
doctor() {
  local name=$1 expected=$2 status=0
  shift 2
  on_hosts "$1" doctor --dir "$work/shared/runs" "${@:2}" >"$work/$name.out" 2>"$work/$name.log" || status=$?
  [[ $status -eq $expected ]] || { cat "$work/$name.out"; failed "doctor: $name ended with $status, not $expected"; }
}

# NAME WORDS TIMES
told() {
  local times
  times=$(grep -c -- "$2" "$work/$1.out" || true)
  [[ $times -eq $3 ]] || { cat "$work/$1.out"; failed "doctor: $1 says '$2' $times times, not $3"; }
}

examine() {
  local n
  began=$(now)
  mkdir "$work/shared"
  doctor healthy 0 "$binary"
  told healthy '^| rank' 1
  told healthy 'GB of memory left' "$HOSTS"
  told healthy '^failure:' 0
  for ((n = 1; n <= HOSTS; ++n)); do told healthy "| upmoe-node$n " "$RANKS_PER_HOST"; done
  [[ -z $(ls -A "$work/shared") ]] || failed "doctor left something behind"
  write_apart
  doctor apart 3 "$work/apart"
  told apart '^failure:' 1
  told apart "on upmoe-node3 is not the folder of that name on rank 0's host" 1
  told apart 'A run would not start here' 1
  echo "doctor: a table of all ranks, $HOSTS hosts, nothing left behind, status 0; with a folder of its own on host 3" \
    "status 3 and one line, $(took "$began")"
  grep '^failure:' "$work/apart.out" | cut -c 1-190 | sed 's/^/    /'
  local status=0
  on_hosts --restarts 0 "$work/apart" train "$work/run.yaml" run.dir="$work/shared/runs/apart" \
    >"$work/apart.out" 2>"$work/apart.log" || status=$?
  [[ $status -eq 3 && $(grep -c 'on upmoe-node3 is not the folder of that name' "$work/apart.log") -eq 1 ]] ||
    failed "train: where host 3 has a folder of its own it ended with $status"
  says apart 'step 1/' && failed "train: a step was made before the folders were compared"
  echo "train: status 3 there too, before its first step"
  began=$(now)
  doctor measured 0 "$binary" --measure
  for n in inside_node: between_nodes:; do told measured "^$n" 1; done
  echo "doctor --measure: a file with links inside a host and between them, $(took "$began")"
  grep -A 3 -E '^(inside_node|between_nodes):' "$work/measured.out" | sed 's/^/    /'
}

make_network
write_agent
write_run
examine
if [[ -n $only ]]; then echo "hosts: ok (doctor alone)"; exit 0; fi
echo "hosts: $HOSTS hosts with $RANKS_PER_HOST ranks, experts over all 6, deadline $DEADLINE s, grace $GRACE s"
began=$(now)
train whole
wait "$job" || failed "the undisturbed run ended with $?"
reached whole "$STEPS" || failed "the undisturbed run did not reach step $STEPS"
echo "undisturbed: $STEPS steps, $(took "$began")"
comes_back compute 3 "host 3 cut off" cable down
comes_back first 1 "host 1 (mpirun, rank 0) cut off" cable down
comes_back off 3 "host 3 switched off" switch_off
stays_away away 3 "host 3 cut off for good" cable down
echo "hosts: ok"
