#!/usr/bin/env bash
# Three "hosts" on this machine: network namespaces joined by a bridge, two ranks on each, Open MPI's TCP between them.
# Trains a tiny mixture of experts undisturbed; then again with one host cut off in the middle, where the job must end
# with a message, start again by launch/run_hosts.sh when the host is back, and give the same losses. By hand: needs
# root and iproute2. usage: tests/hosts.sh [PROGRAM]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$(realpath "${1:-$root/build/release/upmoe}")
[[ $(id -u) -eq 0 ]] || { echo "hosts: needs root" >&2; exit 2; }
[[ -x $program ]] || { echo "hosts: no program at $program" >&2; exit 2; }
work=$(mktemp -d)
hosts=(upmoehost1 upmoehost2 upmoehost3)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cleanup() {
  for host in "${hosts[@]}"; do
    ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip netns del "$host" 2>/dev/null || true
    rm -rf "/etc/netns/$host"
  done
  ip link del upmoebr 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

ip link add upmoebr type bridge
ip link set upmoebr up
for i in 1 2 3; do
  host=${hosts[i - 1]}
  ip netns add "$host"
  ip link add "upmoev$i" type veth peer name eth0 netns "$host"
  ip link set "upmoev$i" master upmoebr up
  ip -n "$host" addr add "10.77.0.$i/24" dev eth0
  ip -n "$host" link set eth0 up
  ip -n "$host" link set lo up
  mkdir -p "/etc/netns/$host"
  printf '127.0.0.1 localhost\n10.77.0.1 %s\n10.77.0.2 %s\n10.77.0.3 %s\n' "${hosts[@]}" >"/etc/netns/$host/hosts"
done
printf '%s slots=2\n' "${hosts[@]}" >"$work/hosts"
# Enters the host's network and takes its name; what Open MPI calls instead of ssh.
cat >"$work/enter" <<'AGENT'
#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
AGENT
chmod +x "$work/enter"

# A random mixture of experts, large enough for a run of some seconds.
mkdir "$work/model"
cat >"$work/model/config.json" <<'JSON'
{"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 64, "intermediate_size": 128,
 "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256,
 "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
 "hidden_act": "silu", "initializer_range": 0.02, "num_experts": 60, "num_experts_per_tok": 4,
 "moe_intermediate_size": 32, "shared_expert_intermediate_size": 128, "norm_topk_prob": false,
 "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "torch_dtype": "float32"}
JSON
"$root/.venv/bin/python" - "$work/tokens.h5" <<'PYTHON'
import sys
import h5py
import numpy as np
with h5py.File(sys.argv[1], "w") as file:
    file["tokens"] = np.random.default_rng(1).integers(0, 256, 100_000, dtype=np.uint32)
    file["document_ends"] = np.array([100_000], dtype=np.int64)
    file.attrs.update({"vocab_size": 256, "eos_id": 0, "tokenizer_sha256": "0" * 64, "format": "upmoe-tokens-1"})
PYTHON

job() {  # RUN_DIR STEPS: on all three hosts, started from the first
  cat >"$work/run.yaml" <<YAML
run: {dir: $1, seed: 1}
model: {path: $work/model, init: random}
data: {train: [{path: $work/tokens.h5, weight: 1.0}], seq_len: 64}
train: {steps: $2, global_batch: 12, micro_batch: 1}
parallel: {ep: 6, node_ranks: 2}
checkpoint: {every: 20, keep: 5}
log: {every: 1, tensorboard: false}
YAML
  "$work/enter" "${hosts[0]}" "$root/launch/run_hosts.sh --hostfile $work/hosts --interface 10.77.0.0/24 --threads 1 \
    --deadline 10 --mpirun --oversubscribe --mpirun --mca --mpirun plm_rsh_agent --mpirun $work/enter \
    $program train $work/run.yaml"
}
losses() {
  "$root/.venv/bin/python" -c 'import json, sys
for line in open(sys.argv[1] + "/metrics.jsonl"):
    record = json.loads(line)
    if "kind" not in record: print(record["step"], repr(record["loss"]))' "$1"
}

steps=120
began=$SECONDS
job "$work/whole" "$steps" >"$work/whole.log" 2>&1 || { tail -n 30 "$work/whole.log"; exit 1; }
echo "undisturbed: $steps steps on 3 hosts x 2 ranks in $((SECONDS - began)) s"

began=$SECONDS
job "$work/cut" "$steps" >"$work/cut.log" 2>&1 &
child=$!
until [[ -d $work/cut/checkpoints/step_00000040 ]]; do sleep 0.1; done
ip link set upmoev3 down
cut_at=$SECONDS
echo "host 3 cut off after step $(losses "$work/cut" | tail -n 1 | cut -d' ' -f1)"
until grep -q 'starting again' "$work/cut.log" || ! kill -0 "$child" 2>/dev/null; do sleep 0.2; done
echo "the job ended $((SECONDS - cut_at)) s later:"
grep -E 'upmoe: error|lost communication|run_hosts: status' "$work/cut.log" | head -n 6 | sed 's/^/  /'
ip link set upmoev3 up
wait "$child" || { echo "the job did not come back"; tail -n 30 "$work/cut.log"; exit 1; }
echo "finished $((SECONDS - began)) s after its first start"
if diff <(losses "$work/whole") <(losses "$work/cut") >"$work/difference"; then
  echo "all $steps losses equal the undisturbed run's to the last digit"
else
  echo "losses differ:"; head -n 10 "$work/difference"; exit 1
fi
