#!/usr/bin/env bash
# Runs clang-tidy over the named sources, or those that differ from the last commit, or with --all every one.
# Version 16, because clang 14 does not know std::source_location. Too slow to be a test: about ten seconds a file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${UPMOE_BUILD:-build/release}

command -v clang-tidy-16 >/dev/null || { echo "tidy: install clang-tidy-16" >&2; exit 2; }
[[ -f $build/compile_commands.json ]] ||
  { echo "tidy: no $build/compile_commands.json; run launch/setup.sh" >&2; exit 2; }

files=()
if [[ ${1:-} == --all ]]; then
  mapfile -t files < <(git ls-files '*.cpp')
elif [[ $# -gt 0 ]]; then
  files=("$@")
else
  mapfile -t files < <(git diff --name-only --diff-filter=d HEAD -- '*.cpp'
    git ls-files --others --exclude-standard '*.cpp')
fi
[[ ${#files[@]} -gt 0 ]] || { echo "tidy: nothing changed"; exit 0; }
# The project is compiled by gcc; clang does not know some of its options.
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" clang-tidy-16 --quiet -p "$build" \
  --extra-arg=-Wno-unknown-warning-option --extra-arg=-Wno-ignored-optimization-argument
echo "tidy: ${#files[@]} files clean"
