#!/usr/bin/env bash
# A command of the project on a machine that has nothing: a bare Debian 12 (apt and git alone) in a chroot, the last
# commit cloned into it, the command run there as root, and once more, from the bare system again, as an ordinary user
# with sudo.
#
#   tests/fresh_machine.sh [--as root|user] [COMMAND...]    default: the README's two commands, in brief
#
# By hand and in .ci/run; needs root and debootstrap. The bare system and Debian's packages are kept in
# UPMOE_FRESH_CACHE (default: ~/.cache/upmoe-fresh), so that the second time is quick; UPMOE_DEBIAN_MIRROR names another
# package index than this machine's own. Ends with the status of the command that failed; 69 where it cannot run at all.
# All that is mounted lies in a mount namespace of its own and ends with it, however it ends.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${UPMOE_FRESH_CACHE:-${HOME:-/root}/.cache/upmoe-fresh}
SUITE=bookworm
# Where this network's own certificates lie inside; a place that no package of Debian writes to.
CERTIFICATES=/etc/this-network.crt

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }
say() { echo "fresh machine: $*"; }
die() { echo "fresh machine: error: $*" >&2; exit 1; }
cannot() {  # a machine that was not tried is never a success
  echo "fresh machine: cannot run here: $*" >&2
  exit 69
}

require_tools() {
  [[ $(id -u) -eq 0 ]] || cannot "a chroot needs root (sudo ${BASH_SOURCE[0]})"
  command -v debootstrap >/dev/null || cannot "debootstrap is missing (apt-get install debootstrap)"
  unshare --mount --pid --fork --kill-child mount -t tmpfs fresh /mnt 2>/dev/null ||
    cannot "this machine does not let root mount (a container without the right to)"
}

# Package index, proxies and certificates are this machine's own, if it has any.
host_sources() {  # one line for each suite of Debian 12 that this machine's apt knows
  apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
    awk -v suite="$SUITE" '$3 == "main" && $2 ~ "^" suite "(-updates|-security)?$" {print "deb", $1, $2, $3}' | sort -u
}

host_certificates() {
  local file
  for file in "${SSL_CERT_FILE:-}" "${PIP_CERT:-}" "${CURL_CA_BUNDLE:-}" /etc/ssl/certs/ca-certificates.crt; do
    if [[ -f $file ]]; then echo "$file"; return; fi
  done
}

make_bare_system() {  # at $1; complete or not there
  local made=$1.part mirror=${UPMOE_DEBIAN_MIRROR:-} sources certificates
  [[ ! -e $1 ]] || return 0
  sources=$(host_sources || true)
  [[ -n $mirror ]] || mirror=$(awk -v suite="$SUITE" '$3 == suite {print $2; exit}' <<<"$sources")
  say "making a bare Debian 12 (once; kept in $cache)"
  rm -rf --one-file-system "$made"  # debootstrap mounts there, and may have been killed
  # Without a mirror debootstrap knows Debian's own.
  debootstrap --variant=minbase --include=git "$SUITE" "$made" ${mirror:+"$mirror"} >"$cache/debootstrap.log" 2>&1 ||
    { tail -n 5 "$cache/debootstrap.log" >&2; die "debootstrap failed; the whole log is $cache/debootstrap.log"; }
  if [[ -z ${UPMOE_DEBIAN_MIRROR:-} && -n $sources ]]; then echo "$sources" >"$made/etc/apt/sources.list"; fi
  # apt's way to its index: proxies, checks of dates and certificates.
  if command -v apt-config >/dev/null; then
    apt-config dump | grep -E '^Acquire::(http|https|Check|Retries|ForceIP)[^ ]* "' \
      >"$made/etc/apt/apt.conf.d/50host" || true
  fi
  certificates=$(host_certificates)
  [[ -z $certificates ]] || cp "$certificates" "$made$CERTIFICATES"
  [[ ! -f /etc/pip.conf ]] || cp /etc/pip.conf "$made/etc/pip.conf"
  rm -rf "$made"/var/lib/apt/lists/* "$made"/var/cache/apt/archives/*.deb
  mv "$made" "$1"
}

# What a command needs of this machine's environment to reach the indexes, as NAME=VALUE lines.
network_environment() {
  local name
  while IFS= read -r name; do echo "$name=${!name}"; done < <(compgen -e | grep -E \
    '^(https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY|PIP_(INDEX_URL|EXTRA_INDEX_URL|TRUSTED_HOST|DEFAULT_TIMEOUT))$')
  [[ ! -f $1$CERTIFICATES ]] || printf '%s\n' PIP_CERT=$CERTIFICATES SSL_CERT_FILE=$CERTIFICATES
}

mount_devices() {  # at $1/dev: what programs expect of it, nothing of this machine's disks
  local device
  mount -t tmpfs -o mode=755 dev "$1/dev"
  for device in null zero full random urandom tty; do
    touch "$1/dev/$device"
    mount --bind "/dev/$device" "$1/dev/$device"
  done
  mkdir -p "$1/dev/shm" "$1/dev/pts"
  mount -t tmpfs -o mode=1777 shm "$1/dev/shm"
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$1/dev/pts"
  ln -s pts/ptmx "$1/dev/ptmx"
  ln -s /proc/self/fd "$1/dev/fd"
}

# Inside the namespaces: the bare system of $1 under a layer that this run alone writes to, with what a kernel gives.
mount_system() {  # BARE WORK
  local system=$2/system
  mount --make-rprivate /
  mkdir -p "$2/written" "$2/overlay" "$system"
  mount -t overlay -o "lowerdir=$1,upperdir=$2/written,workdir=$2/overlay" fresh "$system" 2>/dev/null ||
    cp -a "$1/." "$system/"
  mount -t proc proc "$system/proc"
  mount --rbind -o ro /sys "$system/sys"
  mount_devices "$system"
  mkdir -p "$cache/archives/partial" "$system/var/cache/apt/archives"
  mount --bind "$cache/archives" "$system/var/cache/apt/archives"
  cat /etc/resolv.conf >"$system/etc/resolv.conf"
  cat /etc/hosts >"$system/etc/hosts"
}

# This machine's ccache in a folder that no package of Debian writes to, with its own libraries: it is no part of the
# bare system, whose programs do not find it, nor what it is linked to.
LENT=/lent
lend_ccache() {  # SYSTEM HOME: writes what the compiler's environment needs, as NAME=VALUE lines
  local place=$1$LENT library
  [[ -d ${UPMOE_FRESH_OBJECTS:-} ]] && command -v ccache >/dev/null || return 0
  mkdir -p "$place/lib" "$place/objects"
  cp "$(command -v ccache)" "$place/lib/ccache"
  ldd "$place/lib/ccache" | grep -oE '/[^ ]+' | while IFS= read -r library; do cp "$library" "$place/lib/"; done
  printf '#!/bin/sh\nexec %s --library-path %s/lib --argv0 ccache %s/lib/ccache "$@"\n' \
    $LENT/lib/ld-linux-x86-64.so.2 $LENT $LENT >"$place/ccache"
  chmod 755 "$place/ccache"
  mount --bind "$UPMOE_FRESH_OBJECTS" "$place/objects"
  printf '%s\n' CMAKE_CXX_COMPILER_LAUNCHER=$LENT/ccache CCACHE_DIR=$LENT/objects CCACHE_BASEDIR="$2/upmoe" \
    CCACHE_NOHASHDIR=1 CCACHE_COMPILERCHECK=content
}

run_inside() {  # BARE WORK USER COMMAND...
  local bare=$1 work=$2 user=$3 system=$2/system home=/root user_command=() environment=()
  shift 3
  mount_system "$bare" "$work"
  mapfile -t environment < <(network_environment "$bare")
  environment+=(TERM=dumb PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8)
  if [[ $user != root ]]; then
    home=/home/$user
    chroot "$system" env -i "${environment[@]}" DEBIAN_FRONTEND=noninteractive sh -ec \
      'apt-get update -qq; apt-get install -y -qq --no-install-recommends sudo
       useradd --create-home --shell /bin/bash "$1"
       echo "$1 ALL=(ALL) NOPASSWD: ALL" >/etc/sudoers.d/"$1"' sh "$user" >"$work/sudo.log" 2>&1 ||
      { tail -n 20 "$work/sudo.log" >&2; die "the user and sudo could not be made"; }
    user_command=(setpriv --reuid "$user" --regid "$user" --init-groups)
  fi
  if [[ $user == root ]]; then
    mapfile -t -O ${#environment[@]} environment < <(lend_ccache "$system" "$home")
  fi
  # A folder of another owner is no danger here: nothing of it is run but git's reading.
  git -c safe.directory='*' -c advice.detachedHead=false clone -q --no-hardlinks "$root" "$system$home/upmoe"
  chroot "$system" chown -R "$user:" "$home/upmoe"
  exec chroot "$system" "${user_command[@]}" env -i "${environment[@]}" HOME="$home" USER="$user" \
    bash -c 'cd ~/upmoe && exec "$@"' bash "$@"
}

one_pass() {  # BARE USER COMMAND...
  local bare=$1 user=$2 began=$SECONDS status=0
  shift 2
  work=$(mktemp -d "$cache/run-XXXXXX")
  say "as $user: $*"
  # unshare ends with this process, its first process with it, and all others with the first. Beside this shell, so that
  # the shell hears signals meanwhile; such commands would ignore Ctrl-C.
  setpriv --pdeathsig KILL env --default-signal=INT,QUIT unshare --mount --pid --fork --kill-child \
    "${BASH_SOURCE[0]}" --inside "$bare" "$work" "$user" "$@" &
  pass=$!
  wait "$pass" || status=$?
  pass=''
  rm -rf --one-file-system "$work"
  work=''
  say "as $user: status $status after $((SECONDS - began)) s"
  return "$status"
}

if [[ ${1:-} == --inside ]]; then
  shift
  run_inside "$@"
fi
users=(root upmoe)
while [[ $# -gt 0 ]]; do
  case $1 in
    --as)
      case ${2:-} in
        root) users=(root) ;;
        user) users=(upmoe) ;;
        *) usage >&2; exit 2 ;;
      esac
      shift 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "fresh machine: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    *) break ;;
  esac
done
if [[ $# -eq 0 ]]; then
  set -- bash -c './launch/quickstart.sh --brief --check && ./launch/test.sh -R "^(core|golden|cli|run)_test$"'
fi
require_tools
mkdir -p "$cache"
# One at a time: the bare system and apt's archives are shared.
exec 8>"$cache/lock"
flock -n 8 || { say "another one is running; waiting for it"; flock 8; }
work='' pass=''
end() {
  if [[ -n $pass ]]; then
    kill -KILL "$pass" 2>/dev/null || true
    wait "$pass" || true
  fi
  [[ -z $work ]] || rm -rf --one-file-system "$work"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
rm -rf --one-file-system "$cache"/run-*  # of runs that were killed
bare=$cache/$SUITE
make_bare_system "$bare"
if [[ -n $(git -c safe.directory='*' -C "$root" status --porcelain 2>/dev/null) ]]; then
  say "note: what is not committed is not in the clone"
fi
for user in "${users[@]}"; do one_pass "$bare" "$user" "$@"; done
