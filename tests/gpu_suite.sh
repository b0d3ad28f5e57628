#!/usr/bin/env bash
# Everything that needs a real GPU, for a machine that has one but neither this project's packages nor a network.
#
#   tests/gpu_suite.sh bundle           here: builds the programs, packs them with their libraries into build/gpu_suite
#   tests/gpu_suite.sh run OUT PART...  there: runs parts (all of them unless named), each under 8 minutes, and leaves
#                                       one folder of results for each in OUT; what has finished there is passed over
#
# Parts: ops (each op's tests on the GPU), models (golden files, meshes of as many ranks as there are GPUs, the same run
# twice, resumed, and beside the CPU), sanitizer (compute-sanitizer's four tools over op tests), bench (ops and a layer
# as shares of what the GPU gives), step (whole steps), full (the 14.3 billion parameters with adamw8bit), peers
# (PyTorch and transformers, where python3 has them).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bundle=$root/build/gpu_suite
op_tests=(pointwise norm activation loss embedding routing transfer gemm grouped_gemm attention attention_pair adamw
  adamw8bit)

die() {
  echo "gpu_suite: error: $*" >&2
  exit 1
}

make_bundle() {
  local build=$root/build/gpu programs=() name
  for name in "${op_tests[@]}"; do programs+=("${name}_test"); done
  programs+=(golden_test layer_gradient_test communicator_test layout_equivalence_test make_run bench_gpu bench_step)
  # For any x86-64 of the last ten years, without MPI: one process has one GPU there.
  cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DUPMOE_NATIVE=OFF -DUPMOE_MPI=OFF \
    -DCMAKE_CXX_FLAGS=-march=x86-64-v3 -DUPMOE_CUDA=ON >/dev/null
  grep -q '^UPMOE_NVCC:FILEPATH=.*nvcc$' "$build/CMakeCache.txt" || die "no CUDA toolkit here (nvcc)"
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
  cp -r "$root/tests/golden" "$bundle/stage/golden"
  cp "$root/tests/bench/gpu_peers.py" "$bundle/stage/"
  git -C "$root" rev-parse HEAD >"$bundle/stage/commit"
  echo "$root" >"$bundle/stage/built_at"  # the tests look for their files there
  tar -C "$bundle/stage" -cf - . | xz -T0 -6 >"$bundle/suite.tar.xz"
  rm -rf "$bundle/stage"
  ls -l "$bundle/suite.tar.xz"
}

# --- on the machine with the GPU -------------------------------------------------------------------------------------

unpack() {
  suite=${UPMOE_SUITE:-/tmp/upmoe_suite}
  if [ ! -e "$suite/commit" ]; then
    [ -e "$bundle/suite.tar.xz" ] || die "$bundle/suite.tar.xz is not here: make it with 'gpu_suite.sh bundle'"
    mkdir -p "$suite"
    tar -C "$suite" -xJf "$bundle/suite.tar.xz"
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

# say NAME COMMAND...: runs it with its output in a file; one line of what became of it. Never ends the suite.
say() {
  local name=$1 status=0 start=$SECONDS
  shift
  "$@" >"$part_out/$name.txt" 2>&1 || status=$?
  echo "$name: status $status, $((SECONDS - start)) s" | tee -a "$part_out/summary.txt"
  [ "$status" = 0 ] || { failed=1 && tail -n 15 "$part_out/$name.txt"; }
}

part_ops() {
  local name
  for name in "${op_tests[@]}"; do say "$name" timeout 300 "$suite/bin/${name}_test" --gtest_brief=1; done
  say communicator timeout 120 "$suite/bin/communicator_test" --gtest_brief=1
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

same_losses() { diff <(losses "$1") <(losses "$2"); }

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
  work=$(mktemp -d)
  say golden timeout 400 "$suite/bin/golden_test" --gtest_brief=1
  say meshes timeout 200 "$suite/bin/layout_equivalence_test" '--gtest_filter=Threads/*' --gtest_brief=1
  say make_run "$suite/bin/make_run" "$work"
  say first train_run first device=cuda train.steps=10
  say second train_run second device=cuda train.steps=10
  say twice_the_same same_losses first second
  say on_cpu train_run on_cpu device=cpu train.steps=10
  say beside_the_cpu close_losses first on_cpu
  say resume resumed
  rm -rf "$work"
}

part_sanitizer() {
  local tool name
  if ! command -v compute-sanitizer >/dev/null; then
    echo "no compute-sanitizer here" | tee "$part_out/summary.txt"
    return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    for name in routing norm adamw8bit embedding loss attention; do
      say "${tool}_$name" timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$suite/bin/${name}_test" --gtest_brief=1 --gtest_filter=-*Ten* --gtest_shuffle --gtest_random_seed=7
    done
  done
}

part_bench() {
  say bench timeout 460 "$suite/bin/bench_gpu" "--benchmark_out=$part_out/bench_gpu.json"
  cat "$part_out/bench.txt"
}

watch_memory() { # FILE COMMAND...: and the most memory that the GPU held meanwhile
  local file=$1 status=0
  shift
  nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=200 >"$file.samples" 2>/dev/null &
  local watcher=$!
  "$@" || status=$?
  kill $watcher 2>/dev/null || true
  echo "{\"gpu_memory_used_mib_peak\": $(sort -n "$file.samples" | tail -n 1)}"
  rm -f "$file.samples"
  return $status
}

part_step() {
  local tokens
  for tokens in 8192 16384 32768; do
    say "four_layers_$tokens" watch_memory "$part_out/$tokens" timeout 110 "$suite/bin/bench_step" --layers 4 \
      --tokens $tokens --steps 8 --optimizer adamw
  done
  say four_layers_8bit watch_memory "$part_out/8bit" timeout 110 "$suite/bin/bench_step" --layers 4 --steps 8
  grep -h tokens_per_s "$part_out"/four_layers_*.txt | tail -n 40
}

part_full() {
  say full_16384 watch_memory "$part_out/full" timeout 400 "$suite/bin/bench_step" --layers 24 --tokens 16384 --steps 6
  cat "$part_out/full_16384.txt"
}

part_peers() {
  say peers timeout 460 python3 "$suite/gpu_peers.py" --out "$part_out/gpu_peers.json"
  cat "$part_out/peers.txt"
}

run_parts() {
  local out=$1 part
  shift
  [ $# -gt 0 ] || set -- ops models sanitizer bench step full peers
  unpack
  failed=0
  mkdir -p "$out"
  { date -u && cat "$suite/commit" && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader &&
    uname -a; } >"$out/machine.txt" || die "nvidia-smi finds no GPU"
  for part in "$@"; do
    declare -F "part_$part" >/dev/null || die "no part '$part'"
    part_out=$out/$part
    if [ -e "$part_out/finished" ]; then
      echo "== $part: finished before"
      continue
    fi
    mkdir -p "$part_out"
    echo "== $part"
    "part_$part"
    touch "$part_out/finished"
  done
  return $failed
}

case ${1:-} in
  bundle) make_bundle ;;
  run)
    shift
    [ $# -ge 1 ] || die "run OUT PART..."
    run_parts "$@"
    ;;
  *) sed -n '2,11p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' && exit 2 ;;
esac
