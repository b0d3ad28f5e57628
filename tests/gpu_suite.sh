#!/usr/bin/env bash
# Everything that needs a real GPU, for a machine that has one but neither this project's packages nor a network.
#
#   tests/gpu_suite.sh bundle           here: builds the programs, packs them with their libraries into build/gpu_suite
#   tests/gpu_suite.sh run OUT PART...  there: runs parts (all of them unless named), each under 4 minutes, and leaves
#                                       one folder of results for each in OUT; what has finished there is passed over
#
# Parts: kernels (bench/sm90.sh, first: what hangs there the steps leave out; their variants timed: a table for
# configs/cuda), ops (each op's tests on the GPU), models (golden files, generation, meshes over all GPUs, a run twice,
# resumed, and beside the CPU), sanitizer (compute-sanitizer's four tools), bench (ops and a layer as shares of what the
# GPU gives), algorithms (cuBLASLt's: another table), step (steps of 4 layers), inference (Qwen1.5-7B, A2.7B in turns),
# full (all 14.3 billion parameters with adamw8bit), largest (as many layers as fit), peers (PyTorch and transformers,
# where python3 has them), quickstart (its models, to the CPU's losses). Ops, models, sanitizer run several at once.
# UPMOE_SUITE_TOKENS: the numbers of tokens of bench, step and peers; UPMOE_SUITE_LIMIT: the most seconds of a program.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bundle=$root/build/gpu_suite
op_tests=(pointwise pack layer_norm norm activation loss distillation embedding routing gather_sum sigmoid_routing
  balance_rows capacity router_draws noisy_routing token_groups adversarial_routing transfer gemm grouped_gemm
  expert_ffn experts attention attention_pair attention_decode adamw adamw8bit)

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
die() { echo "gpu_suite: error: $*" >&2; exit 1; }

make_bundle() {
  local build=$root/build/gpu programs=() name
  for name in "${op_tests[@]}"; do programs+=("${name}_test"); done
  programs+=(golden_test generation_test layer_gradient_test communicator_test layout_equivalence_test make_run
    bench_gpu bench_step time_algorithms time_variants sm90_bench)
  # For any x86-64 of the last ten years, without MPI: one process has one GPU there.
  cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DUPMOE_ARCH=x86-64-v3 -DUPMOE_MPI=OFF \
    -DUPMOE_CUDA=ON >/dev/null || die "not configured; a CUDA toolkit is needed here"
  cmake --build "$build" --target "${programs[@]}" upmoe
  rm -rf "$bundle"
  mkdir -p "$bundle/stage/bin" "$bundle/stage/lib"
  for name in "${programs[@]}"; do cp "$build/bin/$name" "$bundle/stage/bin/"; done
  cp "$build/upmoe" "$bundle/stage/bin/"
  strip "$bundle"/stage/bin/*
  # What the programs need beside the C library, the compiler's own libraries and CUDA's: those are there.
  ldd "$bundle"/stage/bin/* | awk '/=> \// {print $3}' | sort -u |
    grep -vE '/lib(c|m|dl|rt|pthread|resolv|stdc\+\+|gcc_s|cublas|cublasLt|nccl|cudart|cudnn|nvrtc)\.so' |
    xargs -I{} cp -L {} "$bundle/stage/lib/"
  strip --strip-unneeded "$bundle"/stage/lib/* 2>/dev/null || true
  cp -r "$root"/tests/golden "$root"/configs/{models,machines} "$bundle/stage/"
  (cd "$root" && cp --parents tests/bench/{gpu_peers,bench_record}.py tests/bench/sm90.sh kernels/cuda/sm90/* \
    kernels/core/expert_variant.h launch/command_line.py "$bundle/stage/")
  python3 "$bundle/stage/tests/bench/gpu_peers.py" --help >/dev/null || die "gpu_peers.py needs more than is packed"
  if [ -s "$root/runs/quickstart/eval/moe.json" ]; then
    mkdir -p "$bundle/stage/quickstart/configs" "$bundle/stage/quickstart/cpu"
    (cd "$root" && cp --parents -r runs/quickstart/tokens/{train,valid}.h5 runs/quickstart/models/dense_init \
      configs/quickstart configs/upcycle "$bundle/stage/quickstart/")
    cp "$root"/runs/quickstart/eval/*.json "$bundle/stage/quickstart/cpu/"
    grep -E '^[A-Z_]+=[0-9]' "$root/launch/quickstart.sh" | sed 's/ *#.*//' >"$bundle/stage/quickstart/settings"
  fi
  git -C "$root" describe --always --dirty --abbrev=40 >"$bundle/stage/commit"
  echo "$root" >"$bundle/stage/built_at"  # the tests look for their files there
  tar -C "$bundle/stage" -cf - . | xz -T0 -6 >"$bundle/suite.tar.xz"
  rm -rf "$bundle/stage"
  ls -l "$bundle/suite.tar.xz"
}

# --- on the machine with the GPU -------------------------------------------------------------------------------------

unpack() {
  suite=${UPMOE_SUITE:-/tmp/upmoe_suite}
  if [ ! -e "$suite/commit" ] || [ "$bundle/suite.tar.xz" -nt "$suite/commit" ]; then
    [ -e "$bundle/suite.tar.xz" ] || die "$bundle/suite.tar.xz is not here: make it with 'gpu_suite.sh bundle'"
    rm -rf "$suite"
    mkdir -p "$suite"
    tar -C "$suite" -xmJf "$bundle/suite.tar.xz"
  fi
  local built_at
  built_at=$(cat "$suite/built_at")
  if [ ! -e "$built_at/tests/golden" ]; then
    mkdir -p "$built_at/tests"
    ln -s "$suite/golden" "$built_at/tests/golden"
  fi
  # CUDA's libraries: of the toolkit, or of PyTorch's packages.
  local folders names=() name
  for name in libcublasLt.so.13 libcublas.so.13 libnccl.so.2 libcudnn.so.9 libnvrtc.so.13; do
    names+=(-o -name "$name*")
  done
  folders=$(find / -xdev \( "${names[@]:1}" \) -not -path '/proc/*' -printf '%h\n' 2>/dev/null | sort -u | paste -sd:)
  export LD_LIBRARY_PATH=$suite/lib:$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} UPMOE_TEST_DEVICE=cuda
}

at_most() {
  local limit=${UPMOE_SUITE_LIMIT:-$1}
  echo $(($1 < limit ? $1 : limit))
}

libraries() { python3 -c "
import ctypes
ctypes.CDLL('libcublasLt.so.13').cublasLtGetVersion.restype = ctypes.c_size_t
print('cuBLASLt', ctypes.CDLL('libcublasLt.so.13').cublasLtGetVersion())
print('cuDNN', ctypes.CDLL('libcudnn.so.9').cudnnGetVersion())
version = ctypes.c_int()
ctypes.CDLL('libnccl.so.2').ncclGetVersion(ctypes.byref(version))
print('NCCL', version.value)"; }

# say NAME COMMAND...: runs it with its output in a file; one line of what became of it. Never ends the suite.
say() {
  local name=$1 status=0 start=$SECONDS
  shift
  "$@" >"$part_out/$name.txt" 2>&1 || status=$?
  echo "$name: status $status, $((SECONDS - start)) s" | tee -a "$part_out/summary.txt"
  [ "$status" = 0 ] || { touch "$part_out/failed" && tail -n 15 "$part_out/$name.txt"; }
}

shown() { say "$@" && cat "$part_out/$1.txt"; } # and its output

# say beside what else runs; as many at once as the machine has pairs of processors.
say_beside() {
  while [ "$(jobs -pr | wc -l)" -ge "$(($(nproc) / 2 + 1))" ]; do wait -n || true; done
  OMP_NUM_THREADS=2 say "$@" &
}

part_ops() {
  local name
  for name in "${op_tests[@]}"; do
    say_beside "$name" timeout "$(at_most 300)" "$suite/bin/${name}_test" --gtest_brief=1
  done
  say_beside communicator timeout "$(at_most 120)" "$suite/bin/communicator_test" --gtest_brief=1
  wait
}

train_run() { # FOLDER SETTINGS...: a small run with its own folder for results
  local folder=$1
  shift
  "$suite/bin/upmoe" train "$work/run.yaml" "run.dir=$work/$folder" parallel.ep=1 "$@"
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
  say_beside golden timeout "$(at_most 230)" "$suite/bin/golden_test" --gtest_brief=1
  say_beside generation timeout "$(at_most 230)" "$suite/bin/generation_test" --gtest_brief=1
  if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then
    # NCCL then ends the program where operations of several communicators begin in different orders.
    NCCL_LAUNCH_RACE_FATAL=1 say_beside meshes timeout "$(at_most 200)" "$suite/bin/layout_equivalence_test" \
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
    attention_pair) echo '*2x65*:*dim28*:*Merge*:CopyColumns*' ;;
    *) echo '*' ;;
  esac
}

part_sanitizer() {
  local tool name filter
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer" | tee "$part_out/summary.txt" && return; }
  for name in "${op_tests[@]}"; do
    for tool in memcheck racecheck initcheck synccheck; do
      filter=$(sanitized $tool "$name") || continue
      say_beside "${tool}_$name" timeout "$(at_most 200)" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$suite/bin/${name}_test" --gtest_brief=1 "--gtest_filter=$filter"
    done
  done
  wait
}

tokens_or() { echo "${UPMOE_SUITE_TOKENS:-$*}"; }
part_bench() {
  shown bench timeout "$(at_most 230)" "$suite/bin/bench_gpu" "--tokens=$(tokens_or 8192 16384 32768 | tr ' ' ,)" \
    "--benchmark_out=$part_out/bench_gpu.json"
}

part_kernels() { shown kernels bash "$suite/tests/bench/sm90.sh" "$part_out/sm90" "$suite/bin/sm90_bench"; }

# For the committed table, should somebody want it there: it changes bits.
part_algorithms() {
  shown algorithms timeout "$(at_most 230)" "$suite/bin/time_algorithms" "$part_out/product_algorithms.yaml" \
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
  local name=$1 right=$out/kernels/sm90/checks.right program=(timeout "$(at_most 200)" "$suite/bin/bench_step" "${@:2}")
  [[ $* != *fused* || ! -d ${right%/*} || -e $right ]] ||
    program=(sh -c 'echo "left out: the part kernels found the fused experts wrong"; exit 1')
  say "$name" watch_memory "$part_out/$name" "${program[@]}"
}

part_step() {
  local tokens some=(--layers 4 --steps 8)
  for tokens in $(tokens_or 8192 16384 32768); do
    bench_steps "four_layers_$tokens" "${some[@]}" --tokens "$tokens" --profile
  done  # and of the most of them, what can be chosen
  some+=(--tokens "$tokens")
  bench_steps "four_layers_${tokens}_fused" "${some[@]}" --kernels-experts fused --profile
  bench_steps "four_layers_${tokens}_elementwise" "${some[@]}" --recompute elementwise
  bench_steps "four_layers_${tokens}_of_8" "${some[@]}" --micro-batches 8
  bench_steps "four_layers_${tokens}_of_8_fused" "${some[@]}" --micro-batches 8 --kernels-experts fused
  bench_steps four_layers_adamw --layers 4 --steps 8 --optimizer adamw
  grep -H tokens_per_s "$part_out"/four_layers_*.txt | sed 's|.*/||' || true
}

memory_mib() { nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1; }

# Both are in memory at once, and a request's keys and values take 1.05 GB of the 7B.
part_inference() {
  local machine at_once=1,16
  machine=$(nvidia-smi -L | sed -n '1{s/.*H200.*/h200-sxm/p; s/.*H100.*/h100-sxm/p; s/.*A100.*/a100-80/p}')
  [ "$(memory_mib)" -lt 140000 ] || at_once+=,64
  shown inference timeout "$(at_most 230)" "$suite/bin/upmoe" generate "$suite"/models/qwen1.5-{7b,moe-a2.7b}.json \
    --bench --concurrency $at_once --rounds 1 --precision bf16 ${machine:+--machine "$suite/machines/$machine.yaml"}
}

part_full() {
  local all=(--layers 24 --steps 5 --profile) of name=
  [ "$(memory_mib)" -ge 140000 ] || { echo "needs a GPU of 140 GiB" | tee "$part_out/summary.txt" && return; }
  # The most tokens of a micro-batch that each policy leaves memory for, on 140 GiB; fused experts keep less.
  bench_steps full_16384_none "${all[@]}" --tokens 16384
  bench_steps full_32768_routed_up "${all[@]}" --tokens 32768 --recompute routed_up
  for of in 1 8; do
    [ $of = 1 ] || all+=(--micro-batches "$of") name=_of_$of
    bench_steps full_24576_swiglu$name "${all[@]}" --tokens 24576 --recompute swiglu
    bench_steps full_32768_elementwise$name "${all[@]}" --tokens 32768 --recompute elementwise --kernels-experts fused
  done
  grep -H -E 'tokens_per_s|peak' "$part_out"/full_*.txt | sed 's|.*/||' || true
}

# As many of its layers as the GPU holds at 8,192 tokens of a step.
part_largest() {
  local layers
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
  shown peers timeout "$(at_most 230)" python3 "$suite/tests/bench/gpu_peers.py" --out "$part_out/gpu_peers.json" \
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
  say "$name" timeout "$(at_most 230)" "$suite/bin/upmoe" train "configs/quickstart/$name.yaml" device=cuda \
    data.seq_len="$SEQ_LEN" train.global_batch="$GLOBAL_BATCH" "$@"
}

step_of() { printf 'runs/quickstart/%s/checkpoints/step_%08d' "$1" "$2"; }

quickstart_eval() { # NAME MODEL
  "$suite/bin/upmoe" eval "$2" --data runs/quickstart/tokens/valid.h5 --seq-len "$SEQ_LEN" \
    --sequences "$EVAL_SEQUENCES" --device cuda >"eval/$1.json"
}

part_quickstart() {
  local models=runs/quickstart/models
  if [ ! -d "$suite/quickstart" ]; then
    echo "not in this bundle: launch/quickstart.sh runs before it is made" | tee "$part_out/summary.txt"
    return
  fi
  cd "$suite/quickstart"
  # shellcheck source=/dev/null
  . ./settings
  mkdir -p eval
  quickstart_run dense train.steps="$DENSE_STEPS" optimizer.lr="$DENSE_LR"
  rm -rf $models/dense $models/moe  # of a part that was cut off; both commands refuse what is there
  say export "$suite/bin/upmoe" export "$(step_of dense "$DENSE_STEPS")" --to $models/dense --dtype fp32
  say upcycle "$suite/bin/upmoe" upcycle configs/upcycle/qwen1.5-moe-a2.7b-tiny.yaml --from $models/dense \
    --to $models/moe
  quickstart_run moe train.steps="$MORE_STEPS" optimizer.lr="$MORE_LR" parallel.ep=1
  say eval_dense quickstart_eval dense $models/dense
  say eval_moe_step0 quickstart_eval moe_step0 $models/moe
  say eval_moe quickstart_eval moe "$(step_of moe "$MORE_STEPS")"
  shown same_as_on_cpu same_as_on_cpu
  cd - >/dev/null
}

run_parts() {
  local out part gpus versions
  out=$(realpath -m "$1")
  shift
  [ $# -gt 0 ] || set -- kernels ops models sanitizer bench algorithms step inference full largest peers quickstart
  for part in "$@"; do
    declare -F "part_$part" >/dev/null || die "no part '$part'; 'gpu_suite.sh --help' names them"
  done
  unpack
  mkdir -p "$out"
  gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader) ||
    die "nvidia-smi finds no GPU"
  versions=$(libraries) || die "cuBLASLt 13, cuDNN 9 or NCCL 2 cannot be loaded (above): set LD_LIBRARY_PATH"
  { date -u +%Y-%m-%dT%H:%M:%SZ && cat "$suite/commit" && echo "$gpus" && uname -sr && echo "$versions"; } \
    >"$out/machine.txt" || die "cannot write $out/machine.txt"
  for part in "$@"; do
    part_out=$out/$part
    if [ -e "$part_out/finished" ]; then
      echo "== $part: finished before"
      continue
    fi
    mkdir -p "$part_out"
    rm -f "$part_out/failed" "$part_out/summary.txt"  # of a start that was cut off
    echo "== $part"
    "part_$part"
    touch "$part_out/finished"
  done
  [ -z "$(find "$out" -name failed)" ]
}

case ${1:-} in
  bundle) make_bundle ;;
  run)
    shift
    [[ ${1:-} == [!-]* ]] || die "expected run OUT PART..., found run ${1:-}"
    run_parts "$@"
    ;;
  -h | --help) usage ;;
  *) usage >&2; exit 2 ;;
esac
