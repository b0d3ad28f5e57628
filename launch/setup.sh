#!/usr/bin/env bash
# Installs what upmoe needs and builds it: Debian packages, a Python environment in .venv, the release build in
# build/release. Quick when there is nothing to do. Outside this folder it touches nothing but Debian packages.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/setup.sh [--program-only] [--no-packages]
  --program-only  build the upmoe program alone, not its tests
  --no-packages   install no Debian packages (for machines that bring their own libraries)
Without root and without sudo, missing Debian packages are an error that lists them.
USAGE
}

program_only=0 packages=1
for argument in "$@"; do
  case $argument in
    --program-only) program_only=1 ;;
    --no-packages) packages=0 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "setup: unknown option '$argument'" >&2; usage >&2; exit 2 ;;
  esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build/release
venv=$root/.venv

say() { echo "setup: $*"; }
die() { echo "setup: error: $*" >&2; exit 1; }

# name=version as in Debian 12; * stands for the packaging revision, which security updates raise.
pinned=(
  'build-essential=12.9*' 'g++=4:12.2.0*' 'cmake=3.25.1*' 'ninja-build=1.11.1*'
  'libdnnl-dev=2.6.3*' 'ocl-icd-opencl-dev=2.3.1*'  # oneDNN's CMake files ask for OpenCL
  'libhdf5-dev=1.10.8*' 'libopenmpi-dev=4.1.4*' 'openmpi-bin=4.1.4*'
  'libyaml-cpp-dev=0.7.0*' 'nlohmann-json3-dev=3.11.2*' 'libcli11-dev=2.1.2*' 'libfmt-dev=9.1.0*'
  'libspdlog-dev=1:1.10.0*' 'python3=3.11.2*' 'python3-venv=3.11.2*'
)
pinned_for_tests=(
  'libgtest-dev=1.12.1*' 'libgmock-dev=1.12.1*' 'libbenchmark-dev=1.7.1*' 'libboost-context1.74-dev=1.74.0*'
  'clang-format-14=1:14.0.6*' 'shellcheck=0.9.0*' 'strace=6.1*'
)

installed_version() {  # empty when not installed; of a package that it has never met, dpkg-query fails
  { dpkg-query -W -f '${db:Status-Status} ${Version}\n' "$1" 2>/dev/null || true; } | sed -n 's/^installed //p'
}

fits() {  # VERSION PATTERN
  # shellcheck disable=SC2053  # the right-hand side is meant as a pattern
  [[ $1 == $2 ]]
}

available_version() {  # the version that fits the pin, empty when the package lists know none
  local version
  while read -r version; do
    if fits "$version" "$2"; then echo "$version"; return; fi
  done < <(apt-cache madison "$1" 2>/dev/null | awk -F'|' '{gsub(/ /, "", $2); print $2}')
}

as_root() {
  if [[ $(id -u) -eq 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo --preserve-env=DEBIAN_FRONTEND "$@"
  else
    die "not root and no sudo. Ask an administrator to run: apt-get install ${missing[*]%%=*}"
  fi
}

install_packages() {
  command -v dpkg-query >/dev/null || die "this is not a Debian system; install the libraries by hand (the list is in" \
    "launch/setup.sh) and use --no-packages"
  local wanted=("${pinned[@]}") entry name pattern version requests=()
  missing=()
  [[ $program_only -eq 1 ]] || wanted+=("${pinned_for_tests[@]}")
  for entry in "${wanted[@]}"; do
    name=${entry%%=*} pattern=${entry#*=}
    version=$(installed_version "$name")
    if [[ -z $version ]]; then
      missing+=("$entry")
    elif ! fits "$version" "$pattern"; then
      say "note: $name $version is installed; upmoe is developed with ${pattern%\*}. Going on with what is there."
    fi
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0

  say "installing Debian packages: ${missing[*]%%=*}"
  export DEBIAN_FRONTEND=noninteractive
  for entry in "${missing[@]}"; do
    if [[ -z $(available_version "${entry%%=*}" "${entry#*=}") ]]; then
      as_root apt-get update -qq || die "apt-get update failed; see the message above"
      break
    fi
  done
  for entry in "${missing[@]}"; do
    name=${entry%%=*} pattern=${entry#*=}
    version=$(available_version "$name" "$pattern")
    if [[ -n $version ]]; then
      requests+=("$name=$version")
    else
      say "note: this system does not offer $name ${pattern%\*}; taking its own version"
      requests+=("$name")
    fi
  done
  as_root apt-get install -y -qq --no-install-recommends "${requests[@]}" >"$root/build/apt.log" 2>&1 ||
    { tail -n 20 "$root/build/apt.log" >&2; die "apt-get install failed; the whole log is build/apt.log"; }
}

has_nvcc() { command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}/bin/nvcc ]]; }

install_python() {
  local python=/usr/bin/python3 stamp=$venv/.requirements wanted
  [[ -x $python ]] || python=$(command -v python3) || die "python3 not found"
  local files=("$root/launch/requirements.txt")
  ! has_nvcc || files+=("$root/launch/requirements-cuda.txt")
  wanted=$("$python" -V && cat "${files[@]}")
  [[ -x $venv/bin/python && -f $stamp && $(cat "$stamp") == "$wanted" ]] && return 0
  say "installing Python packages into .venv: $(grep -hv '^#' "${files[@]}" | tr '\n' ' ')"
  rm -rf "$venv"
  "$python" -m venv "$venv" || die "cannot make the Python environment $venv"
  local file options=()
  for file in "${files[@]}"; do
    # Of the second file the headers alone are wanted, not the gigabytes beside them.
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${options[@]}" -r "$file" ||
      die "pip could not install $file; see the message above"
    options=(--no-deps)
  done
  echo "$wanted" >"$stamp"
}

# -march=native writes the same command line on every processor, so neither ninja nor ccache would notice that this
# folder (or a home folder shared by several hosts) came to another one.
processor_flags() { c++ --version | head -n 1; c++ -march=native -Q --help=target; }

build_release() {
  local flags_file=$build/processor_flags.txt configure=() source_of_cache
  mkdir -p "$build"
  if [[ ! -f $flags_file ]] || ! cmp -s "$flags_file" <(processor_flags); then
    [[ ! -f $flags_file ]] || say "the processor or the compiler changed; building anew"
    configure=(--fresh)
  elif [[ ! -f $build/build.ninja ]]; then
    configure=(--fresh)
  else
    source_of_cache=$(sed -n 's/^CMAKE_HOME_DIRECTORY:INTERNAL=//p' "$build/CMakeCache.txt")
    [[ $source_of_cache == "$root" ]] || { say "the folder moved; building anew"; configure=(--fresh); }
  fi
  if [[ ${#configure[@]} -gt 0 ]]; then
    say "configuring build/release"
    command -v ccache >/dev/null && configure+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
    rm -f "$flags_file"
    (cd "$root" && cmake --preset release "${configure[@]}" >"$build/configure.log" 2>&1) ||
      { tail -n 30 "$build/configure.log" >&2; die "cmake failed; the whole log is build/release/configure.log"; }
    (cd "$root" && cmake --build --preset release --target clean >/dev/null)
    processor_flags >"$flags_file"
  fi
  local target=all
  [[ $program_only -eq 0 ]] || target=upmoe
  if ! ninja -C "$build" -n "$target" | grep -q 'no work to do'; then
    say "building $target (the first time takes some minutes)"
  fi
  export CCACHE_EXTRAFILES=$flags_file
  if [[ -t 1 ]]; then
    ninja -C "$build" "$target" || die "the build failed; see above"
  else
    ninja -C "$build" "$target" >"$build/build.log" 2>&1 ||
      { grep -A 12 -m 3 -E 'FAILED|error' "$build/build.log" >&2 || tail -n 30 "$build/build.log" >&2
        die "the build failed; the whole log is build/release/build.log"; }
  fi
}

mkdir -p "$build"
[[ $packages -eq 0 ]] || install_packages
install_python
build_release
[[ -x $build/upmoe ]] || die "the build made no $build/upmoe"
say "ready: build/release/upmoe"
