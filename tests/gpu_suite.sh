#!/usr/bin/env bash
# Everything that needs a real GPU, for a machine that has one and this source tree, but neither the project's packages
# nor a network.
#
#   tests/gpu_suite.sh bundle [PROGRAM...]     here: builds the programs (and those, of tests) and packs them with their
#                                              libraries into build/gpu_suite/suite.tar.xz
#   tests/gpu_suite.sh run OUT [OPTION...] [PART...]
#                                              there: runs parts (all of them unless named), and leaves one folder of
#                                              results for each in OUT; what has finished there is passed over
#     --seconds N    for all of it: no program begins that has no time left
#     --pack FILE    after each part all results so far, as one .tar.gz
#     --from FILE    such a file of an earlier run, to go on from
#
# Parts, in the order of what they tell: kernels (bench/sm90.sh's checks: what is wrong there, or hangs, others leave
# out), ops (each op's tests), models (golden files, generation, meshes where there are several GPUs, a run twice,
# resumed, beside the CPU), step (steps of 4 layers), full (all 14.3 billion parameters with adamw8bit), largest (as
# many layers as fit a smaller GPU), times (of the experts' kernels), peers (PyTorch and transformers, where python3 has
# them), bench (ops and a layer as shares of what the GPU gives), inference (Qwen1.5-7B, A2.7B in turns), variants (of
# the experts' kernels: a table for configs/cuda), quickstart (its models, to the CPU's losses), memcheck (of what is
# new), algorithms (cuBLASLt's: another table), sanitizer (compute-sanitizer's four tools). Ops, models, sanitizer run
# several at once. In the environment: UPMOE_SUITE_TOKENS, the numbers of tokens of bench, step and peers;
# UPMOE_SUITE_ANSWER, the tokens of an answer in inference; UPMOE_SUITE_LIMIT, the most seconds of a program;
# UPMOE_SUITE_MIB, what tree and bundle may come to together.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bundle=$root/build/gpu_suite
all_parts=(kernels ops models step full largest times peers bench inference variants quickstart memcheck algorithms
  sanitizer)
mapfile -t op_tests <"$root/tests/kernels/gpu_op_tests.txt"

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
die() { echo "gpu_suite: error: $*" >&2; exit 1; }
wrong() { echo "gpu_suite: error: $*" >&2; exit 2; }

# What the programs need beside the C library, the compiler's own libraries and CUDA's: those are there.
pack_libraries() {
  ldd "$bundle"/stage/bin/* | awk '/=> \// {print $3}' | sort -u |
    grep -vE '/lib(c|m|dl|rt|pthread|resolv|stdc\+\+|gcc_s|cublas|cublasLt|nccl|cudart|cudnn|nvrtc)\.so' |
    xargs -I{} cp -L {} "$bundle/stage/lib/"
  strip --strip-unneeded "$bundle"/stage/lib/* 2>/dev/null || true
}

# Of a quickstart that was run here: what its models are trained from there, and what they came to here.
pack_quickstart() {
  if [ ! -s "$root/runs/quickstart/eval/moe.json" ]; then
    echo "gpu_suite: without the part quickstart: launch/quickstart.sh has not run here"
    return
  fi
  mkdir -p "$bundle/stage/quickstart/configs" "$bundle/stage/quickstart/cpu"
  (cd "$root" && cp --parents -r runs/quickstart/tokens/{train,valid}.h5 runs/quickstart/models/dense_init \
    configs/quickstart configs/upcycle "$bundle/stage/quickstart/")
  cp "$root"/runs/quickstart/eval/*.json "$bundle/stage/quickstart/cpu/"
  grep -E '^[A-Z_]+=[0-9]' "$root/launch/quickstart.sh" | sed 's/ *#.*//' >"$bundle/stage/quickstart/settings"
}

require_size() { # bytes of the tree's files and of the bundle, where both have to travel
  local tree packed
  tree=$(cd "$root" && git ls-files -z | xargs -0 stat -c %s | awk '{sum += $1} END {print int(sum / 1048576) + 1}')
  packed=$(($(stat -c %s "$bundle/suite.tar.xz") / 1048576 + 1))
  echo "gpu_suite: $packed MiB, with the tree's files $((tree + packed))"
  [ -z "${UPMOE_SUITE_MIB:-}" ] || [ $((tree + packed)) -le "$UPMOE_SUITE_MIB" ] ||
    die "more than $UPMOE_SUITE_MIB MiB (UPMOE_SUITE_MIB)"
}

make_bundle() { # PROGRAM...
  local build=$root/build/gpu programs=("$@") name
  for name in "${op_tests[@]}" golden generation communicator; do programs+=("${name}_test"); done
  programs+=(make_run bench_gpu bench_step time_algorithms time_variants sm90_bench)
  # For any x86-64 of the last ten years, without MPI: one process has one GPU there.
  cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DUPMOE_ARCH=x86-64-v3 -DUPMOE_MPI=OFF \
    -DUPMOE_CUDA=ON >/dev/null || die "not configured; a CUDA toolkit is needed here"
  cmake --build "$build" --target "${programs[@]}" upmoe
  for name in cudnn nccl; do # without them a program is built as well, and computes otherwise
    [[ $(ldd "$build/upmoe") == *"lib$name."* ]] ||
      die "upmoe was built without $name; launch/setup.sh, then rm -r $build"
  done
  rm -rf "$bundle"
  mkdir -p "$bundle/stage/bin" "$bundle/stage/lib"
  for name in "${programs[@]}"; do cp "$build/bin/$name" "$bundle/stage/bin/"; done
  cp "$build/upmoe" "$bundle/stage/bin/"
  strip "$bundle"/stage/bin/*
  pack_libraries
  pack_quickstart
  python3 "$root/tests/bench/gpu_peers.py" --help >/dev/null || die "gpu_peers.py needs more than python3"
  git -C "$root" describe --always --dirty --abbrev=40 >"$bundle/stage/commit"
  echo "$root" >"$bundle/stage/built_at"  # the tests look for their files there
  # Programs hold the same kernels, tens of megabytes apart: a window that reaches from one to the next.
  tar -C "$bundle/stage" -cf - . | xz -T1 --lzma2=preset=6,dict=64MiB >"$bundle/suite.tar.xz"
  rm -rf "$bundle/stage"
  require_size
}

# --- on the machine with the GPU -------------------------------------------------------------------------------------

unpack() {
  local digest built_at folders names=() name
  suite=${UPMOE_SUITE:-/tmp/upmoe_suite}
  [ -e "$bundle/suite.tar.xz" ] || die "$bundle/suite.tar.xz is not here: make it with 'gpu_suite.sh bundle'"
  digest=$(sha256sum <"$bundle/suite.tar.xz")
  if [ "$(cat "$suite/digest" 2>/dev/null)" != "$digest" ]; then
    rm -rf "$suite"
    mkdir -p "$suite"
    tar -C "$suite" -xmJf "$bundle/suite.tar.xz"
    echo "$digest" >"$suite/digest"
  fi
  built_at=$(cat "$suite/built_at")
  if [ ! -e "$built_at" ]; then
    mkdir -p "$(dirname "$built_at")"
    ln -s "$root" "$built_at"
  fi
  # CUDA's libraries: of the toolkit, or of PyTorch's packages.
  for name in libcublasLt.so.13 libcublas.so.13 libnccl.so.2 libcudnn.so.9 libnvrtc.so.13; do
    names+=(-o -name "$name*")
  done
  [ -e "$suite/folders" ] ||
    find / -xdev \( "${names[@]:1}" \) -not -path '/proc/*' -printf '%h\n' 2>/dev/null | sort -u |
    paste -sd: >"$suite/folders" || true
  folders=$(cat "$suite/folders")
  export LD_LIBRARY_PATH=$suite/lib:$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} UPMOE_TEST_DEVICE=cuda
}

least=5 # seconds, in which a program can end
left() { echo $((deadline - SECONDS)); }
at_most() {
  local limit=${UPMOE_SUITE_LIMIT:-$1} rest
  rest=$(($(left) - least))
  limit=$(($1 < limit ? $1 : limit))
  echo $((rest < limit ? (rest > 1 ? rest : 1) : limit))
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
  if grep -qs "^$name: status 0," "$part_out/summary.txt"; then return; fi # by a run that was cut off
  if (($(left) < 2 * least)); then
    echo "$name: no time left" | tee -a "$part_out/left_out"
    return
  fi
  "$@" >"$part_out/$name.txt" 2>&1 || status=$?
  echo "$name: status $status, $((SECONDS - start)) s" | tee -a "$part_out/summary.txt"
  [ "$status" = 0 ] || { touch "$part_out/failed" && tail -n 15 "$part_out/$name.txt"; }
}

shown() { say "$@" && tail -n 30 "$part_out/$1.txt" 2>/dev/null || true; } # and the end of its output

# say beside what else runs; as many at once as the machine has pairs of processors.
say_beside() {
  while [ "$(jobs -pr | wc -l)" -ge "$(($(nproc) / 2 + 1))" ]; do wait -n || true; done
  OMP_NUM_THREADS=2 say "$@" &
}

# shellcheck source=tests/support/gpu_parts.sh
. "$root/tests/support/gpu_parts.sh"

pack_results() { # a file that is there is whole
  [ -n "$pack" ] || return 0
  mkdir -p "$(dirname "$pack")"
  tar -C "$out" -czf "$pack.part" . && mv "$pack.part" "$pack"
}

describe_machine() {
  local gpus versions
  gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader) ||
    die "nvidia-smi finds no GPU"
  versions=$(libraries) || die "cuBLASLt 13, cuDNN 9 or NCCL 2 cannot be loaded (above): set LD_LIBRARY_PATH"
  { date -u +%Y-%m-%dT%H:%M:%SZ && cat "$suite/commit" && echo "$gpus" && uname -sr && echo "$versions"; } \
    >"$out/machine.txt" || die "cannot write $out/machine.txt"
}

run_part() { # PART
  part_out=$out/$1
  if [ -e "$part_out/finished" ]; then
    echo "== $1: finished before"
    return
  fi
  mkdir -p "$part_out"
  rm -f "$part_out/failed" "$part_out/left_out"
  case $1 in
    models | quickstart) rm -f "$part_out/summary.txt" ;; # their programs need what those before them left elsewhere
    *) [ ! -e "$part_out/summary.txt" ] || sed -i '/: status 0,/!d' "$part_out/summary.txt" ;;
  esac
  echo "== $1 (after $SECONDS s)"
  "part_$1"
  [ -e "$part_out/left_out" ] || touch "$part_out/finished"
}

run_parts() { # OUT OPTION... PART...
  local out part part_out deadline=$((1 << 40)) pack='' from=''
  out=$(realpath -m "$1")
  shift
  while [[ ${1:-} == --* ]]; do
    [ $# -ge 2 ] || wrong "$1 needs a value"
    case $1 in
      --seconds) [[ $2 =~ ^[1-9][0-9]*$ ]] || wrong "--seconds '$2': expected a number"; deadline=$2 ;;
      --pack) pack=$(realpath -m "$2") ;;
      --from) from=$(realpath -m "$2"); [ -s "$from" ] || wrong "--from $2: no such file" ;;
      *) wrong "run knows no $1" ;;
    esac
    shift 2
  done
  [ $# -gt 0 ] || set -- "${all_parts[@]}"
  for part in "$@"; do
    [[ " ${all_parts[*]} " == *" $part "* ]] || wrong "no part '$part'; 'gpu_suite.sh --help' names them"
  done
  unpack
  mkdir -p "$out"
  [ -z "$from" ] || tar -C "$out" -xzf "$from"
  describe_machine
  for part in "$@"; do
    run_part "$part"
    pack_results
  done
  [ -z "$(find "$out" -name failed -o -name left_out)" ]
}

case ${1:-} in
  bundle) make_bundle "${@:2}" ;;
  run)
    shift
    [[ ${1:-} == [!-]* ]] || wrong "expected run OUT PART..., found run ${1:-}"
    run_parts "$@"
    ;;
  -h | --help) usage ;;
  *) usage >&2; exit 2 ;;
esac
