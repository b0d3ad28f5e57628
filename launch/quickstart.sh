#!/usr/bin/env bash
# From nothing to a trained mixture of experts on real text: trains a tokenizer and a small dense model, makes it a
# mixture of 60 experts, trains that on two ranks, and compares. Everything lies under runs/quickstart; finished stages
# are not repeated.
set -euo pipefail

# What the run is; a change needs --fresh.
MEGABYTES=10           # of text
VOCAB=4096
SEQ_LEN=256
DENSE_STEPS=300        # of GLOBAL_BATCH x SEQ_LEN tokens each
MORE_STEPS=1000        # of the mixture of experts, and of the dense model that goes on beside it
GLOBAL_BATCH=6
DENSE_LR=2.0e-3
MORE_LR=2.0e-3
EVAL_SEQUENCES=128     # of every held-out loss, during training and in the table
EVERY=()               # more keys of all runs

# With --brief: the same stages in about a minute of computing, to see that all of them work here.
brief_knobs() {
  MEGABYTES=1 DENSE_STEPS=24 MORE_STEPS=12 EVAL_SEQUENCES=16
  EVERY=(schedule.warmup=4 train.eval_every=8 checkpoint.every=8)
}

usage() {
  cat <<'USAGE'
usage: launch/quickstart.sh [--brief] [--text DIR] [--seed N] [--fresh] [--check]
  --brief     a few dozen steps under runs/quickstart_brief: shows that every stage works here; its losses mean nothing
  --text DIR  train on the text files of DIR instead of the sources of Python's standard library
  --seed N    other random weights, experts and order of the data, under runs/quickstart_seedN (default: 1, under
              runs/quickstart); launch/quickstart_seeds.py compares what several seeds came to
  --fresh     remove what an earlier run left and start over
  --check     exit with 1 unless the mixture of experts ends better than both dense models and none of its experts has
              died (with --brief: unless every stage left its result); whether the exported model is the checkpoint is
              always checked
USAGE
}

text='' fresh=0 check=() brief=() seed=1
while [[ $# -gt 0 ]]; do
  case $1 in
    --text)
      [[ -d ${2:-} ]] || { echo "quickstart: --text '${2:-}': expected a folder" >&2; usage >&2; exit 2; }
      text=$(realpath "$2")
      shift 2 ;;
    --brief) brief=(--brief); brief_knobs; shift ;;
    --seed)
      [[ ${2:-} =~ ^[1-9][0-9]{0,8}$ ]] ||
        { echo "quickstart: --seed '${2:-}': expected 1, 2, 3 ..." >&2; usage >&2; exit 2; }
      seed=$2
      shift 2 ;;
    --fresh) fresh=1; shift ;;
    --check) check=(--check); shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "quickstart: unknown option '$1'" >&2; usage >&2; exit 2 ;;
  esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
began=$SECONDS
launch/setup.sh --program-only
python=.venv/bin/python
upmoe=build/release/upmoe
out=runs/quickstart${brief:+_brief}
[[ $seed -eq 1 ]] || out+=_seed$seed

say() { printf '\n== %s (after %d min %02d s)\n' "$*" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }
alone() { OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} "$@"; }

settings="text=$text $MEGABYTES MB vocab $VOCAB seq $SEQ_LEN steps $DENSE_STEPS $MORE_STEPS batch $GLOBAL_BATCH"
settings+=" lr $DENSE_LR $MORE_LR eval $EVAL_SEQUENCES seed $seed"
if [[ $fresh -eq 1 ]]; then
  rm -rf "$out"
elif [[ -f $out/settings && $(cat "$out/settings") != "$settings" ]]; then
  echo "quickstart: $out was made with other settings ($(cat "$out/settings")); use --fresh to start over" >&2
  exit 2
fi
mkdir -p "$out"/{text,tokens,models,eval}
echo "$settings" >"$out/settings.part"  # under its name when it is whole, as all that a later start takes for finished
mv "$out/settings.part" "$out/settings"

make_tokens() {
  local text_option=()
  [[ -z $text ]] || text_option=(--text "$text")
  "$python" launch/collect_text.py "${text_option[@]}" --megabytes "$MEGABYTES" --out "$out/text"
  local train valid
  mapfile -t train <"$out/text/train.txt"
  mapfile -t valid <"$out/text/valid.txt"
  "$python" data/tokenize.py --train-vocab "$VOCAB" --force --tokenizer "$out/tokens/tokenizer.json" \
    --out "$out/tokens/train.h5" "${train[@]}"
  "$python" data/tokenize.py --tokenizer "$out/tokens/tokenizer.json" --out "$out/tokens/valid.h5" "${valid[@]}"
}

# The shape of the dense model; upmoe draws its weights.
write_dense_config() {
  local dir=$1 vocab eos
  read -r vocab eos < <("$python" -c 'import h5py, sys
attributes = h5py.File(sys.argv[1], "r").attrs
print(int(attributes["vocab_size"]), int(attributes["eos_id"]))' "$out/tokens/train.h5")
  mkdir -p "$dir"
  cp "$out/tokens/tokenizer.json" "$dir/"
  cat >"$dir/config.json.part" <<JSON
{
  "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
  "vocab_size": $vocab, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
  "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "tie_word_embeddings": false, "initializer_range": 0.02,
  "attention_dropout": 0.0, "use_sliding_window": false, "bos_token_id": $eos, "eos_token_id": $eos,
  "torch_dtype": "float32"
}
JSON
  mv "$dir/config.json.part" "$dir/config.json"
}

export_model() {  # RUN NAME
  [[ -f $out/models/$2/config.json ]] || alone "$upmoe" export "$out/$1" --to "$out/models/$2" --dtype fp32
}

evaluate() {  # NAME MODEL
  if [[ ! -s $out/eval/$1.json ]]; then
    alone "$upmoe" eval "$2" --data "$out/tokens/valid.h5" --seq-len "$SEQ_LEN" --sequences "$EVAL_SEQUENCES" \
      >"$out/eval/$1.json.part"
    mv "$out/eval/$1.json.part" "$out/eval/$1.json"
  fi
}

[[ ${#brief[@]} -eq 0 ]] || say "a brief run: every stage, but too few steps to learn anything; its losses mean nothing"

# NAME MODEL ORDER: the keys that put a run into $out, with the seed for the order of its data; the files of
# configs/quickstart are those of the first seed.
places() {
  keys=(run.dir="$out/$1" run.seed="$seed" data.seed="$3" model.path="$out/models/$2"
    data.train="[{path: $out/tokens/train.h5, weight: 1.0}]" data.valid="$out/tokens/valid.h5"
    data.seq_len="$SEQ_LEN" train.global_batch="$GLOBAL_BATCH" train.eval_sequences="$EVAL_SEQUENCES" "${EVERY[@]}")
}
more=(train.steps="$MORE_STEPS" optimizer.lr="$MORE_LR")

say "text and tokens"
[[ -f $out/tokens/train.h5 && -f $out/tokens/valid.h5 ]] || make_tokens

say "a small dense model from random weights"
[[ -f $out/models/dense_init/config.json ]] || write_dense_config "$out/models/dense_init"
places dense dense_init "$seed"
alone "$upmoe" train configs/quickstart/dense.yaml "${keys[@]}" train.steps="$DENSE_STEPS" optimizer.lr="$DENSE_LR"
export_model dense dense

say "upcycling: 60 experts out of the dense model's feed-forward layers"
[[ -f $out/models/moe/config.json ]] || alone "$upmoe" upcycle configs/upcycle/qwen1.5-moe-a2.7b-tiny.yaml \
  --from "$out/models/dense" --to "$out/models/moe" seed="$seed"

say "training the mixture of experts on two ranks, 30 experts on each"
places moe moe $((seed + 1))
launch/run_local.sh 2 "$upmoe" train configs/quickstart/moe.yaml "${keys[@]}" "${more[@]}"
export_model moe moe_trained

say "the dense model goes on for as many tokens"
places dense_continued dense $((seed + 1))
alone "$upmoe" train configs/quickstart/dense_continued.yaml "${keys[@]}" "${more[@]}"
export_model dense_continued dense_continued

say "held-out loss"
evaluate dense "$out/models/dense"
evaluate dense_continued "$out/models/dense_continued"
evaluate moe_step0 "$out/models/moe"
evaluate moe "$out/moe"
evaluate moe_exported "$out/models/moe_trained"

page=$(UPMOE_PYTHON=$python "$upmoe" report "$out/dense" "$out/dense_continued" "$out/moe" --continued \
  --label dense --label 'dense, continued' --label 'mixture of experts' --out "$out/report")
status=0
"$python" launch/quickstart_table.py "$out" "${check[@]}" "${brief[@]}" || status=$?
echo "pictures: $page"
say "done"
exit "$status"
