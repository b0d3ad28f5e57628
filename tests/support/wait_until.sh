# shellcheck shell=bash
# To be sourced by what has failed(), which says a line and ends the script.

wait_until() {  # SECONDS WHAT CONDITION...
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    [[ $SECONDS -lt $end ]] || failed "$what: not within the time"
    sleep 0.05
  done
}
