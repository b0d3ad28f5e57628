#!/usr/bin/env bash
# The exchange of expert rows between hosts, flat and by nodes: two hosts (network namespaces) of two ranks each, joined
# by a link of a given rate, experts over all four ranks. Arguments go to exchange.py (--help lists them). Root only.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
# shellcheck disable=SC2034  # read by pretended_hosts.sh
HOSTS=2 RANKS_PER_HOST=2
[[ $(id -u) -eq 0 ]] || { echo "exchange: error: making network namespaces needs root" >&2; exit 2; }
if [[ ${1:-} != --inside ]]; then
  work=$(mktemp -d /tmp/upmoe-exchange-XXXX)
  trap 'rm -rf "$work" /tmp/ompi.upmoe-node[1-9].*' EXIT
  unshare --net --mount --pid --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" --inside "$work" "$@"
  exit 0
fi
work=$2
shift 2
# shellcheck source=tests/support/pretended_hosts.sh
source tests/support/pretended_hosts.sh
make_network
write_agent
exec .venv/bin/python tests/bench/exchange.py --work "$work" --network "$NETWORK.0/24" "$@"
