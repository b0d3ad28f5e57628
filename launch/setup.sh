#!/usr/bin/env bash
# Installs what upmoe needs and builds it: Debian packages, a Python environment in .venv, the release build in
# build/release. Quick when there is nothing to do. Outside this folder it touches nothing but Debian packages. It may
# be interrupted at any moment and started again: a step counts as done only when its last line is written.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/setup.sh [--program-only] [--no-packages] [--no-build] [--arch NAME]
  --program-only  build the upmoe program alone, not its tests
  --no-packages   install no Debian packages (for machines that bring their own libraries)
  --no-build      stop before the compiler: packages, Python environment, and build/release configured
  --arch NAME     processor to compile for: native (this one; the default), x86-64-v3 (AVX2), x86-64-v4 (AVX-512)
What is needed: launch/packages.txt. What is missing is named with the command that installs it before anything is
built. CUDA is built where a usable toolkit is found; ccache is used where it is installed.
USAGE
}

program_only=0 packages=1 build_it=1 arch=native
while [[ $# -gt 0 ]]; do
  case $1 in
    --program-only) program_only=1 ;;
    --no-packages) packages=0 ;;
    --no-build) build_it=0 ;;
    --arch) arch=${2:-}; [[ $# -lt 2 ]] || shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "setup: unknown option '$1'" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[[ $arch =~ ^(native|x86-64-v[34])$ ]] ||
  { echo "setup: --arch '$arch': expected native, x86-64-v3 or x86-64-v4" >&2; usage >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build/release
venv=$root/.venv

say() { echo "setup: $*"; }
die() { echo "setup: error: $*" >&2; exit 1; }

# shellcheck source=launch/packages.sh
source "$root/launch/packages.sh"

nvcc_found() {  # where cmake/FindCudaCompiler.cmake looks too
  local folder
  for folder in "${CUDA_HOME:+$CUDA_HOME/bin}" "${CUDA_PATH:+$CUDA_PATH/bin}" /usr/local/cuda/bin; do
    if [[ -n $folder && -x $folder/nvcc ]]; then echo "$folder/nvcc"; return; fi
  done
  command -v nvcc || true
}

install_python() {
  local python=${UPMOE_SYSTEM_PYTHON:-/usr/bin/python3} stamp=$venv/.requirements wanted file options=()
  [[ -x $python ]] || python=$(command -v python3) || die "python3 not found"
  local files=("$root/launch/requirements.txt")
  [[ -z $(nvcc_found) ]] || files+=("$root/launch/requirements-cuda.txt")
  wanted=$("$python" -V && cat "${files[@]}")
  [[ -x $venv/bin/python && -f $stamp && $(cat "$stamp") == "$wanted" ]] && return 0
  say "installing Python packages into .venv: $(grep -hv '^#' "${files[@]}" | tr '\n' ' ')"
  rm -f "$stamp"  # first: a half-removed environment must not look whole
  rm -rf "$venv"
  "$python" -m venv "$venv" || die "cannot make the Python environment $venv"
  for file in "${files[@]}"; do
    # Of the second file headers and small tools alone are wanted, not the gigabytes beside them.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${options[@]}" -r "$file" ||
      die "pip could not install $file; see the message above"
    options=(--no-deps)
  done
  write_whole "$stamp" "$wanted"
}

write_whole() {  # FILE TEXT: there with all of the text, or not there
  printf '%s\n' "$2" >"$1.part"
  mv "$1.part" "$1"
}

# -march=native writes the same command line on every processor, so neither ninja nor ccache would notice that this
# folder (or a home folder shared by several hosts) came to another one.
processor_flags() { c++ --version | sed -n 1p; c++ "-march=$arch" -Q --help=target; }

# Tests stay in a build folder that has them, so that a program-only set-up between two whole ones costs nothing.
tests_wanted() {
  [[ $program_only -eq 1 ]] || { echo ON; return; }
  if grep -qs '^tests ON$' "$build/configured.txt" && [[ -z $(missing_packages tests) ]]; then
    echo ON
  else
    echo OFF
  fi
}

# All that the configuration depends on beside the sources that ninja itself watches.
configuration() {  # TESTS
  local nvcc
  nvcc=$(nvcc_found)
  printf '%s\n' "folder $root" "tests $1" "arch $arch" "presets $(cksum <"$root/CMakePresets.json")" \
    "nvcc $nvcc $([[ -z $nvcc ]] || "$nvcc" --version 2>&1 | tail -n 1)" \
    "cuda ${CUDA_HOME:-} ${CUDA_PATH:-} ${NCCL_HOME:-} ${CUDNN_HOME:-} ${CUDNN_FRONTEND_HOME:-}"
}

compiler_launcher() { sed -n 's/^CMAKE_CXX_COMPILER_LAUNCHER:[A-Z]*=//p' "$build/CMakeCache.txt" 2>/dev/null || true; }

configure() {  # TESTS
  local flags=$build/processor_flags.txt wanted launcher options=(--fresh "-DUPMOE_TESTS=$1" "-DUPMOE_ARCH=$arch")
  # Objects are as good as the processor and the compiler that they were made for; others go, whatever they are.
  if [[ ! -f $flags ]] || ! cmp -s "$flags" <(processor_flags); then
    [[ ! -f $flags ]] || say "the processor or the compiler changed; building anew"
    rm -f "$flags"
    rm -rf "$build"
    mkdir -p "$build"
    processor_flags >"$flags.part"
    mv "$flags.part" "$flags"
  fi
  wanted=$(configuration "$1")
  launcher=$(compiler_launcher)
  if [[ -f $build/build.ninja && -f $build/configured.txt && $(cat "$build/configured.txt") == "$wanted" ]] &&
    { [[ -z $launcher ]] || command -v "${launcher%%;*}" >/dev/null; }; then
    return 0
  fi
  say "configuring build/release"
  if [[ -z ${CMAKE_CXX_COMPILER_LAUNCHER:-} ]] && command -v ccache >/dev/null; then
    options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
  fi
  rm -f "$build/configured.txt"
  (cd "$root" && cmake --preset release "${options[@]}" >"$build/configure.log" 2>&1) ||
    { tail -n 30 "$build/configure.log" >&2; die "cmake failed; the whole log is build/release/configure.log"; }
  write_whole "$build/configured.txt" "$wanted"
  sed -n 's/^-- \(CUDA: \)/\1/p' "$build/configure.log" | while IFS= read -r line; do say "$line"; done
}

build_release() {
  local target=all
  [[ $program_only -eq 0 ]] || target=upmoe
  if ! ninja -C "$build" -n "$target" | grep -q 'no work to do'; then
    say "building $target (the first time takes some minutes)"
  fi
  export CCACHE_EXTRAFILES=$build/processor_flags.txt
  if [[ -t 1 ]]; then
    ninja -C "$build" "$target" || die "the build failed; see above"
  else
    ninja -C "$build" "$target" >"$build/build.log" 2>&1 ||
      { grep -A 12 -m 3 -E 'FAILED|error' "$build/build.log" >&2 || tail -n 30 "$build/build.log" >&2
        die "the build failed; the whole log is build/release/build.log"; }
  fi
}

# Ctrl-C ends set-up even where the command that it reached makes an ordinary failure of it, which some steps forgive.
trap 'exit 130' INT
# One set-up at a time. What it starts holds the lock too: compilers that outlive a killed set-up still write objects.
for folder in "$root" "$root/build"; do
  [[ ! -e $folder || -w $folder ]] ||
    die "$(id -un) may not write to $folder, which belongs to $(stat -c %U "$folder"); change its owner (chown -R)"
done
mkdir -p "$root/build"
exec 9>"$root/build/setup.lock"
flock -n 9 || { say "waiting for another set-up of this folder, or for what a killed one left running"; flock 9; }
provide_packages
install_python
configure "$(tests_wanted)"
if [[ $build_it -eq 0 ]]; then
  say "ready to build: ninja -C build/release upmoe"
  exit 0
fi
build_release
[[ -x $build/upmoe ]] || die "the build made no $build/upmoe"
say "ready: build/release/upmoe"
