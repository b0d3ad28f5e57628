#!/usr/bin/env bash
# Times a training step of upmoe and of transformers side by side and prints the ratio.
# usage: tests/bench/against_transformers.sh [--shapes NAME...] [--precisions NAME...] [--rounds N] ...
# Arguments go to against_transformers.py (--help lists them all).
#
# UPMOE_PEER_PYTHON: a Python with torch and transformers; without it one is made in build/peer-venv (about 5 GB).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"

peer=${UPMOE_PEER_PYTHON:-}
if [[ -z $peer ]]; then
  peer=$root/build/peer-venv/bin/python
  if [[ ! -f $root/build/peer-venv/.complete ]]; then
    echo "installing torch 2.11.0 and transformers 5.23.0 into build/peer-venv"
    rm -rf "$root/build/peer-venv"
    /usr/bin/python3 -m venv "$root/build/peer-venv"
    "$root/build/peer-venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 transformers==5.23.0
    touch "$root/build/peer-venv/.complete"
  fi
fi
[[ -x build/release/upmoe ]] || launch/setup.sh --program-only
exec .venv/bin/python tests/bench/against_transformers.py --peer-python "$peer" "$@"
