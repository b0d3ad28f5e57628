#!/usr/bin/env bash
# The shell scripts: clean under shellcheck, and with exit status 2 for a wrong command line, nothing done before it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
failures=0

fail() { echo "FAILED: $*"; failures=$((failures + 1)); }

expect_usage() {  # COMMAND...: status 2 and words on standard error
  local status=0 message
  message=$("$@" 2>&1 >/dev/null) || status=$?
  [[ $status -eq 2 ]] || fail "$* ended with $status instead of 2"
  [[ -n $message ]] || fail "$* said nothing on standard error"
}

while IFS= read -r script; do
  shellcheck --severity=warning --external-sources --source-path="$root" "$script" || fail "shellcheck $script"
done < <(find "$root/launch" "$root/tests" "$root/.ci" -name '*.sh' -o -path "$root/.ci/run")

expect_usage "$root/launch/setup.sh" --no-such-option
expect_usage "$root/launch/quickstart.sh" --no-such-option
expect_usage "$root/launch/test.sh" --no-such-option
expect_usage "$root/launch/quickstart.sh" --seed
expect_usage "$root/launch/quickstart.sh" --seed 0
expect_usage "$root/launch/quickstart.sh" --text
expect_usage "$root/launch/quickstart.sh" --text "$root/no_such_folder"
expect_usage "$root/launch/run_local.sh"
expect_usage "$root/launch/run_local.sh" two true
expect_usage "$root/launch/run_local.sh" 2 "$root/no_such_program" train run.yaml
expect_usage "$root/launch/after_training.sh"
expect_usage "$root/launch/after_training.sh" "$root/no_such_folder"
expect_usage "$root/launch/after_training.sh" "$root/tests/golden/moe_odd" --only no_such_step
expect_usage "$root/tests/gpu_suite.sh"
expect_usage "$root/tests/same_losses.sh"
expect_usage "$root/tests/setup_interrupted.sh" --times
expect_usage "$root/tests/setup_interrupted.sh" --within soon
for script in setup quickstart test run_local run_hosts after_training; do
  help=$("$root/launch/$script.sh" --help) || fail "$script.sh --help ended with $?"
  [[ $help == *usage:* ]] || fail "$script.sh --help tells no usage"
done

for script in "$root"/tests/*.sh; do
  help=$("$script" --help) || fail "$script --help ended with $?"
  [[ $help == *"tests/${script##*/} "* ]] || fail "$script --help tells no usage"
  expect_usage "$script" --no-such-option
done

# Ranks see their number, and OMP_NUM_THREADS as it was: the program shares the cores out. A failing rank's status comes
# through.
# shellcheck disable=SC2016  # for the shell of the ranks
lines=$(env -u OMP_NUM_THREADS "$root/launch/run_local.sh" 2 sh -c \
  'echo "rank $OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE with ${OMP_NUM_THREADS:-its share}"' | sort)
[[ $lines == "rank 0 of 2 with its share"$'\n'"rank 1 of 2 with its share" ]] || fail "run_local.sh gave: $lines"
status=0
"$root/launch/run_local.sh" 2 sh -c 'exit 3' >/dev/null 2>&1 || status=$?
[[ $status -eq 3 ]] || fail "run_local.sh turned a rank's status 3 into $status"

[[ $failures -eq 0 ]] || exit 1
echo "scripts: ok"
