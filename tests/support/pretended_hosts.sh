# shellcheck shell=bash
# Hosts on one machine: network namespaces upmoe-node1, 2, ... joined by a bridge, and an agent that enters them as ssh
# enters a host. To be sourced by a script that runs as root in network, mount and process namespaces of its own
# (unshare --net --mount --pid), so that all of it ends with the script.
#
# Set before: HOSTS, RANKS_PER_HOST, work (a folder; hosts, hostfile and agent are written there). Sets NETWORK.
NETWORK=10.77.0
: "${HOSTS:?}" "${RANKS_PER_HOST:?}" "${work:?}"

make_network() {
  mount -t tmpfs tmpfs /run
  mkdir -p /run/netns
  touch /run/netns/top
  mount --bind /proc/self/ns/net /run/netns/top  # keeps the bridge alive when no process is left beside it
  ip link set lo up
  ip link add bridge0 type bridge
  ip link set bridge0 up
  local n name
  echo "127.0.0.1 localhost" >"$work/hosts"
  for ((n = 1; n <= HOSTS; ++n)); do
    name=upmoe-node$n
    ip netns add "$name"
    ip link add "port$n" type veth peer name eth0 netns "$name"
    ip link set "port$n" master bridge0 up
    ip -n "$name" addr add "$NETWORK.$n/24" dev eth0
    ip -n "$name" link set lo up
    ip -n "$name" link set eth0 up
    echo "$NETWORK.$n $name" >>"$work/hosts"
    echo "$name slots=$RANKS_PER_HOST" >>"$work/hostfile"
  done
  mount --bind "$work/hosts" /etc/hosts
}

cable() {  # up | down, NUMBER of the host: at the bridge, so that the host itself sees a silent network, not an error
  ip link set "port$2" "$1"
}

# In place of ssh; like it, it does not get through to a host that is cut off.
write_agent() {
  cat >"$work/agent" <<'AGENT'
#!/bin/sh
host=$1
shift
if ! ip -n top link show "port${host#upmoe-node}" | grep -q LOWER_UP; then
  echo "agent: connect to host $host: No route to host" >&2
  exit 255
fi
exec nsenter --net="/run/netns/$host" unshare --uts sh -c 'hostname "$0"; eval "$1"' "$host" "$*"
AGENT
  chmod +x "$work/agent"
}

# The hosts share the cores of this machine, which Open MPI cannot know: a waiting rank must let the others work.
export OMPI_MCA_mpi_yield_when_idle=1
