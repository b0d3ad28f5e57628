#!/usr/bin/env bash
# Runs a command as N ranks on this machine: launch/run_local.sh 2 build/release/upmoe train configs/quickstart/moe.yaml
# The cores are shared out evenly (OMP_NUM_THREADS overrides); more ranks than cores are allowed, and slow.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/run_local.sh RANKS COMMAND [ARGUMENT...]" >&2
  exit 2
fi
ranks=$1
shift
command -v mpirun >/dev/null || { echo "run_local: mpirun not found; run launch/setup.sh" >&2; exit 2; }

cores=$(nproc)
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  OMP_NUM_THREADS=$((cores / ranks > 0 ? cores / ranks : 1))
fi
export OMP_NUM_THREADS

# Unbound: Open MPI would pin both ranks of two to one core each and their threads with them. Oversubscribed is allowed
# always, because what Open MPI counts as a slot and what a container grants differ.
options=(-np "$ranks" --bind-to none --oversubscribe)
if [[ $(id -u) -eq 0 ]]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
if [[ -e /.dockerenv || -e /run/.containerenv ]]; then
  # Containers usually forbid reading another process's memory; without this Open MPI fails on large messages.
  export OMPI_MCA_btl_vader_single_copy_mechanism=none
fi
exec mpirun "${options[@]}" "$@"
