# shellcheck shell=bash
# The parts of tests/gpu_suite.sh, which sources this. A part runs its programs by say() and its kin, with its results
# in $part_out; those of all parts lie in $out, the programs in $suite.
# shellcheck disable=SC2154  # suite, out, part_out, op_tests, root: set by the suite

part_ops() {
  local name
  for name in "${op_tests[@]}"; do
    say_beside "$name" timeout -k 5 "$(at_most 90)" "$suite/bin/${name}_test" --gtest_brief=1
  done
  say_beside communicator timeout -k 5 "$(at_most 60)" "$suite/bin/communicator_test" --gtest_brief=1
  wait
}

train_run() { # FOLDER SETTINGS...: a small run with its own folder for results
  local folder=$1
  shift
  timeout -k 5 "$(at_most 60)" "$suite/bin/upmoe" train --deadline 30 "$work/run.yaml" "run.dir=$work/$folder" \
    parallel.ep=1 "$@"
}

losses() { python3 -c "
import json, sys
for line in open(sys.argv[1] + '/metrics.jsonl'):
    r = json.loads(line)
    if 'kind' not in r: print(r['step'], repr(r['loss']), repr(r['grad_norm']))" "$work/$1"; }

same_losses() {
  local one two
  one=$(losses "$1") && two=$(losses "$2") && [ -n "$one" ] && diff <(echo "$one") <(echo "$two")
}

close_losses() { python3 -c "
import sys
a, b = ([line.split() for line in open(name)] for name in sys.argv[1:3])
worst = max(abs(float(x[1]) - float(y[1])) / abs(float(y[1])) for x, y in zip(a, b, strict=True))
print(f'{len(a)} steps, largest relative difference of a loss {worst:.2e} (allowed 1e-5)')
sys.exit(not worst < 1e-5)" <(losses "$1") <(losses "$2"); }

resumed() {
  train_run cut device=cuda train.steps=10 checkpoint.every=5 && rm -r "$work/cut/checkpoints/step_00000010" &&
    train_run cut device=cuda train.steps=10 checkpoint.every=5 && same_losses cut first
}

part_models() {
  local how
  work=$(mktemp -d)
  say_beside golden timeout -k 5 "$(at_most 120)" "$suite/bin/golden_test" --gtest_brief=1
  say_beside generation timeout -k 5 "$(at_most 120)" "$suite/bin/generation_test" --gtest_brief=1
  if [ "$(nvidia-smi -L | wc -l)" -gt 1 ] && [ -e "$suite/bin/layout_equivalence_test" ]; then
    # NCCL then ends the program where operations of several communicators begin in different orders.
    NCCL_LAUNCH_RACE_FATAL=1 say_beside meshes timeout -k 5 "$(at_most 200)" "$suite/bin/layout_equivalence_test" \
      '--gtest_filter=Threads/*' --gtest_brief=1
  fi
  say make_run "$suite/bin/make_run" "$work"
  say_beside first train_run first device=cuda train.steps=10
  say_beside second train_run second device=cuda train.steps=10
  say_beside on_cpu train_run on_cpu device=cpu train.steps=10
  say_beside offloaded train_run offloaded device=cuda train.steps=10 optimizer.offload=true
  local ways # every value of train.recompute but none
  ways=$("$suite/bin/upmoe" train --help | sed -n 's/^ *train\.recompute = .*\[none | \(.*\)\]$/\1/p' | tr -d '|')
  say ways_to_recompute test -n "$ways"
  for how in $ways; do
    say_beside "recompute_$how" train_run "recompute_$how" device=cuda train.steps=10 "train.recompute=$how"
  done
  for how in one two; do
    say_beside "bf16_$how" train_run "bf16_$how" device=cuda train.steps=10 train.precision=bf16 parallel.reduce=bf16 \
      optimizer.name=adamw8bit
  done
  wait
  say twice_the_same same_losses first second
  say bf16_twice_the_same same_losses bf16_one bf16_two
  say beside_the_cpu close_losses first on_cpu
  say offloaded_the_same same_losses first offloaded
  for how in $ways; do
    say "recompute_${how}_the_same" same_losses first "recompute_$how"
  done
  say resume resumed
  rm -rf "$work"
}

# Which tests a tool runs: cuDNN's and cuBLAS's own kernels are not this project's to judge (synccheck and initcheck
# find things in cuDNN's), and memcheck alone looks at how they are called.
sanitized() { # TOOL TEST
  case $2 in
    gemm | grouped_gemm | expert_ffn | experts | adversarial_routing) [ "$1" = memcheck ] && echo '*' ;;
    attention) echo '*fp32*2x65*:*fp32*dim28*:*packing3*:*packing4*:*Rope*' ;;
    # racecheck did not end within its time.
    attention_pair) [ "$1" != racecheck ] && echo '*2x65*:*dim28*:*Merge*:CopyColumns*' ;;
    *) echo '*' ;;
  esac
}

sanitizer_runs() { # whether there is one that this machine lets look at its GPU; some containers do not
  if ! command -v compute-sanitizer >/dev/null; then
    echo "no compute-sanitizer" | tee "$part_out/summary.txt"
    return 1
  fi
  say probe timeout -k 5 "$(at_most 60)" compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$suite/bin/transfer_test" --gtest_brief=1
  grep -qs '^probe: status 0,' "$part_out/summary.txt"
}

sanitize() { # TOOL TEST...
  local tool=$1 name filter
  shift
  for name in "$@"; do
    filter=$(sanitized "$tool" "$name") || continue
    say_beside "${tool}_$name" timeout -k 5 "$(at_most 200)" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$suite/bin/${name}_test" --gtest_brief=1 "--gtest_filter=$filter"
  done
  wait
}

# What has not run on a GPU, and what it writes where nobody looks.
part_memcheck() { ! sanitizer_runs || sanitize memcheck experts loss expert_ffn token_groups noisy_routing layer_norm; }

part_sanitizer() {
  local tool
  sanitizer_runs || return 0
  for tool in memcheck racecheck initcheck synccheck; do sanitize $tool "${op_tests[@]}"; done
}

tokens_or() { echo "${UPMOE_SUITE_TOKENS:-$*}"; }
# Without what the part kernels found wrong: one kernel that hangs would take all that is behind it along.
part_bench() {
  local checks=$out/kernels/sm90 wrong=()
  if [ -d "$checks" ]; then
    [ -e "$checks/check_cross_entropy.right" ] || wrong+=(clusters)
    [ -e "$checks/checks.right" ] || wrong+=(fused)
  fi
  shown bench timeout -k 5 "$(at_most 230)" "$suite/bin/bench_gpu" \
    "--tokens=$(tokens_or 8192 16384 32768 | tr ' ' ,)" "--benchmark_out=$part_out/bench_gpu.json" \
    ${wrong:+"--benchmark_filter=-$(IFS='|' && echo "${wrong[*]}")"}
}

sm90() { # STAGE
  shown "$1" bash "$root/tests/bench/sm90.sh" "$out/kernels/sm90" "$suite/bin/sm90_bench" "$1"
}
part_kernels() { sm90 checks; }
part_times() { sm90 times; }
part_variants() { sm90 variants; }

# For the committed table, should somebody want it there: it changes bits.
part_algorithms() {
  shown algorithms timeout -k 5 "$(at_most 230)" "$suite/bin/time_algorithms" "$part_out/product_algorithms.yaml" \
    "--tokens=$(tokens_or 8192 16384 32768 | tr ' ' ,)"
}

watch_memory() { # FILE COMMAND...: and the most memory that the GPU held meanwhile
  local file=$1 status=0
  shift
  nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=200 >"$file.samples" 2>/dev/null &
  local watcher=$!
  "$@" || status=$?
  kill $watcher 2>/dev/null || true
  [ ! -s "$file.samples" ] || echo "{\"gpu_memory_used_mib_peak\": $(sort -n "$file.samples" | tail -n 1)}"
  rm -f "$file.samples"
  return $status
}

# NAME OPTIONS...; no fused experts where the part kernels found them wrong: one that hangs takes a step's whole limit.
bench_steps() {
  local name=$1 right=$out/kernels/sm90/checks.right program
  program=(timeout -k 5 "$(at_most 120)" "$suite/bin/bench_step" "${@:2}")
  [[ $* != *fused* || ! -d ${right%/*} || -e $right ]] ||
    program=(sh -c 'echo "left out: the part kernels found the fused experts wrong"; exit 1')
  say "$name" watch_memory "$part_out/$name" "${program[@]}"
}

losses_of_steps() { sed -n 's/.*"step": \([0-9]*\), "loss": \([^,]*\),.*/\1 \2/p' "$part_out/$1.txt"; } # NAME
near_losses() { # NAME OTHER ALLOWED: the losses of two programs of bench_steps, relative difference
  python3 -c "
import sys
a, b = (dict(line.split() for line in open(name)) for name in sys.argv[1:3])
both = sorted(set(a) & set(b), key=int)
worst = max(abs(float(a[n]) - float(b[n])) / abs(float(b[n])) for n in both)
print(f'{len(both)} steps, largest relative difference of a loss {worst:.2e} (allowed {sys.argv[3]})')
sys.exit(not worst <= float(sys.argv[3]))" <(losses_of_steps "$1") <(losses_of_steps "$2") "$3"
}

part_step() {
  local tokens four=(--layers 4) some fused=(--kernels-experts fused)
  for tokens in $(tokens_or 8192 16384 32768); do
    bench_steps "four_layers_$tokens" "${four[@]}" --steps 8 --tokens "$tokens" --profile
  done  # and of the most of them, what can be chosen
  four+=(--tokens "$tokens") some=("${four[@]}" --steps 8)
  bench_steps "four_layers_${tokens}_fused" "${some[@]}" "${fused[@]}" --profile
  bench_steps "four_layers_${tokens}_fused_again" "${four[@]}" "${fused[@]}" --steps 4
  say fused_twice_the_same near_losses "four_layers_${tokens}_fused" "four_layers_${tokens}_fused_again" 0
  # Experts fused are rounded elsewhere than as a product for each. All of bf16's rounding, against fp32, moves a loss
  # by 1.0e-4 within eight steps of half the width, on a CPU (bench_step --device cpu --layers 4 --width 1024 --heads 8
  # --expert-width 704 --shared-width 2816 --vocab 8192 --tokens 1024 --seq-len 256 --steps 8 --precision bf16, fp32).
  # Three times that is allowed; no GPU has shown it: where this fails, look at why before it is widened.
  say fused_as_streams near_losses "four_layers_${tokens}_fused" "four_layers_$tokens" 3e-4
  if [ ! -d "$out/kernels/sm90" ] || [ -e "$out/kernels/sm90/check_cross_entropy.right" ]; then
    bench_steps "four_layers_${tokens}_clusters" "${some[@]}" --kernels-cross-entropy clusters
  fi
  bench_steps "four_layers_${tokens}_elementwise" "${some[@]}" --recompute elementwise
  bench_steps "four_layers_${tokens}_of_8" "${some[@]}" --micro-batches 8
  bench_steps "four_layers_${tokens}_of_8_fused" "${some[@]}" --micro-batches 8 "${fused[@]}"
  bench_steps four_layers_adamw --layers 4 --steps 8 --optimizer adamw
  grep -H tokens_per_s "$part_out"/four_layers_*.txt | sed 's|.*/||' | grep '"step": [78]' || true
}

memory_mib() { nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sed -n 1p; }

# Both are in memory at once, and a request's keys and values take 1.05 GB of the 7B.
part_inference() {
  local machine at_once=1,16
  machine=$(nvidia-smi -L | sed -n '1{s/.*H200.*/h200-sxm/p; s/.*H100.*/h100-sxm/p; s/.*A100.*/a100-80/p}')
  [ "$(memory_mib)" -lt 140000 ] || at_once+=,64
  shown inference timeout -k 5 "$(at_most 230)" "$suite/bin/upmoe" generate \
    "$root"/configs/models/qwen1.5-{7b,moe-a2.7b}.json --bench --out "${UPMOE_SUITE_ANSWER:-128}" \
    --concurrency $at_once --rounds 1 --precision bf16 \
    ${machine:+--machine "$root/configs/machines/$machine.yaml"}
}

# In the order of what they tell. The most tokens of a micro-batch that each policy leaves memory for, on 140 GiB; fused
# experts keep less. The second and the third differ in their experts alone.
part_full() {
  local all=(--layers 24 --steps 5 --profile) fused=(--kernels-experts fused)
  [ "$(memory_mib)" -ge 140000 ] || { echo "needs a GPU of 140 GiB" | tee "$part_out/summary.txt" && return; }
  bench_steps full_32768_elementwise_fused "${all[@]}" --tokens 32768 --recompute elementwise "${fused[@]}"
  bench_steps full_24576_swiglu "${all[@]}" --tokens 24576 --recompute swiglu
  bench_steps full_24576_swiglu_fused "${all[@]}" --tokens 24576 --recompute swiglu "${fused[@]}"
  bench_steps full_32768_elementwise_fused_of_8 "${all[@]}" --tokens 32768 --recompute elementwise --micro-batches 8 \
    "${fused[@]}"
  bench_steps full_24576_swiglu_of_8 "${all[@]}" --tokens 24576 --recompute swiglu --micro-batches 8
  bench_steps full_32768_routed_up "${all[@]}" --tokens 32768 --recompute routed_up
  bench_steps full_16384_none "${all[@]}" --tokens 16384
  grep -H -E 'tokens_per_s|peak' "$part_out"/full_*.txt | sed 's|.*/||' | grep -E '"step": 5|peak' || true
}

# As many of its layers as the GPU holds at 8,192 tokens of a step.
part_largest() {
  local layers
  [ "$(memory_mib)" -lt 140000 ] || { echo "all of them fit: part full" | tee "$part_out/summary.txt" && return; }
  # In millions of bytes: 3,880 for a layer's state and what it keeps, 8,000 for all else; one more is tried first.
  layers=$((($(memory_mib) * 1049 / 1000 - 8000) / 3880 + 1))
  layers=$((layers < 24 ? layers : 24))
  while [ $layers -gt 0 ]; do
    rm -f "$part_out/failed"
    bench_steps "largest_${layers}_layers" --layers $layers --tokens 8192 --steps 6 --recompute routed_up --profile
    grep -q 'out of memory' "$part_out/largest_${layers}_layers.txt" || break
    layers=$((layers - 1))
  done
  grep -H -E 'tokens_per_s|peak' "$part_out/largest_${layers}_layers.txt" | sed 's|.*/||' || true
}

part_peers() {
  # shellcheck disable=SC2046  # one argument each
  shown peers timeout -k 5 "$(at_most 230)" python3 "$root/tests/bench/gpu_peers.py" --out "$part_out/gpu_peers.json" \
    --tokens $(tokens_or 8192 16384 32768)
}

# The same losses: steps in another order of sums end a little elsewhere, by much less than what training gains. Allowed
# is twice the most that was seen, 0.0051, of 400 steps of the mixture. It trains 1,000 by now, of which no GPU has
# shown anything yet: where they end farther apart than this, look at why before it is widened.
same_as_on_cpu() { python3 -c "
import json, sys
loss = lambda folder, name: json.load(open(f'{folder}/{name}.json'))['loss']
wrong = []
for name in ('dense', 'moe_step0', 'moe'):
    here, there = loss('eval', name), loss('cpu', name)
    print(f'{name}: {here:.4f} on the GPU, {there:.4f} on the CPU')
    wrong += [] if abs(here - there) < 0.01 else [name]
sys.exit(', '.join(wrong) + ': too far apart' if wrong else 0)"; }

quickstart_run() { # NAME OVERRIDES...: one of its runs, on the GPU
  local name=$1
  shift
  say "$name" timeout -k 5 "$(at_most 120)" "$suite/bin/upmoe" train --deadline 60 \
    "configs/quickstart/$name.yaml" device=cuda data.seq_len="$SEQ_LEN" train.global_batch="$GLOBAL_BATCH" "$@"
}

step_of() { printf 'runs/quickstart/%s/checkpoints/step_%08d' "$1" "$2"; }

quickstart_eval() { # NAME MODEL
  timeout -k 5 "$(at_most 60)" "$suite/bin/upmoe" eval "$2" --data runs/quickstart/tokens/valid.h5 \
    --seq-len "$SEQ_LEN" --sequences "$EVAL_SEQUENCES" --device cuda >"eval/$1.json"
}

train_quickstart() { # in the folder of its files
  local models=runs/quickstart/models
  # shellcheck source=/dev/null
  . ./settings
  mkdir -p eval
  quickstart_run dense train.steps="$DENSE_STEPS" optimizer.lr="$DENSE_LR"
  rm -rf $models/dense $models/moe  # of a part that was cut off; both commands refuse what is there
  say export timeout -k 5 "$(at_most 60)" "$suite/bin/upmoe" export "$(step_of dense "$DENSE_STEPS")" \
    --to $models/dense --dtype fp32
  say upcycle timeout -k 5 "$(at_most 60)" "$suite/bin/upmoe" upcycle \
    configs/upcycle/qwen1.5-moe-a2.7b-tiny.yaml --from $models/dense --to $models/moe
  quickstart_run moe train.steps="$MORE_STEPS" optimizer.lr="$MORE_LR" parallel.ep=1
  say eval_dense quickstart_eval dense $models/dense
  say eval_moe_step0 quickstart_eval moe_step0 $models/moe
  say eval_moe quickstart_eval moe "$(step_of moe "$MORE_STEPS")"
  shown same_as_on_cpu same_as_on_cpu
}

part_quickstart() {
  if [ ! -d "$suite/quickstart" ]; then
    echo "not in this bundle: launch/quickstart.sh runs before it is made" | tee "$part_out/summary.txt"
    return
  fi
  (cd "$suite/quickstart" && train_quickstart)
}
