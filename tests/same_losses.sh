#!/usr/bin/env bash
# Two programs train the same: configs/tiny_moe.yaml from one upcycled model, on one rank and on two, in fp32 and
# bf16. Losses, balance terms, gradient norms, loads of experts and held-out losses must be equal to the last bit. For a
# change that means to leave numbers alone; by hand: keep the program of the commit before it.
#
# usage: [RANKS="1 2"] tests/same_losses.sh OLD_PROGRAM NEW_PROGRAM [section.key=value ...]     settings for all runs
set -euo pipefail
usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; exit 2 ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ $# -ge 2 && -x $1 && -x $2 ]] || { sed -n '/^# usage/s/^# //p' "$0" >&2; exit 2; }
old=$(realpath "$1") new=$(realpath "$2")
shift 2
python=$root/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" # to which the paths of the configuration are relative
mkdir data models

cat >dense.json <<'JSON'
{"model_type": "qwen2", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4,
 "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
 "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false}
JSON
"$root/launch/make_random_dense.py" models/tiny-dense --config dense.json --std 0.05 --dtype fp32 >/dev/null
"$old" upcycle "$root/configs/upcycle/qwen1.5-moe-a2.7b-tiny.yaml" --from models/tiny-dense --to models/tiny-moe \
  >upcycle.txt 2>&1 || { cat upcycle.txt; exit 1; }
PYTHONPATH=$root/tests/bench "$python" -c "
from bench_record import write_tokens
write_tokens('data/train.h5', 512, 100_000), write_tokens('data/valid.h5', 512, 8 * 256 + 1)"

train() { # PROGRAM FOLDER RANKS SETTINGS...
  local program=$1 folder=$2 ranks=$3
  shift 3
  "$root/launch/run_local.sh" "$ranks" "$program" train "$root/configs/tiny_moe.yaml" "run.dir=$folder" \
    "parallel.ep=$ranks" train.steps=20 train.eval_every=0 checkpoint.every=0 log.every=1 log.tensorboard=false "$@" \
    >"$folder.txt" 2>&1 || { cat "$folder.txt"; exit 1; }
}

for ranks in ${RANKS:-1 2}; do
  for precision in fp32 bf16; do
    train "$old" old "$ranks" "train.precision=$precision" "$@"
    train "$new" new "$ranks" "train.precision=$precision" "$@"
    "$python" - "$ranks $precision" <<'PY'
import json, sys

KEYS = ("loss", "aux_loss", "z_loss", "grad_norm", "expert_load", "eval_loss")
def steps(run):
    return [[json.loads(line).get(key) for key in KEYS] for line in open(f"{run}/metrics.jsonl")]

old, new = steps("old"), steps("new")
losses = [line[0] for line in new if line[0] is not None]
if old != new or not losses:
    different = [f"{a[:4]}  {b[:4]}" for a, b in zip(old, new) if a != b]
    sys.exit("\n".join([f"{sys.argv[1]}: {len(old)} and {len(new)} lines, of which differ:", *different]))
print(f"{sys.argv[1]}: the same, {losses[0]!r} to {losses[-1]!r}")
PY
    rm -r old new
  done
done
