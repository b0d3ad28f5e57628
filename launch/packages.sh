# What launch/setup.sh does with launch/packages.txt; sourced by it. Uses its say, die, root, packages and program_only.
# shellcheck shell=bash disable=SC2154
packages_file=${UPMOE_PACKAGES_FILE:-$root/launch/packages.txt}
packages_log=$root/build/apt.log
LOCK_PATIENCE=600  # seconds that another apt or dpkg may take

has_dpkg() { command -v dpkg-query >/dev/null; }

declare -A pattern_of=()
while read -r name pattern _; do pattern_of[$name]=$pattern; done < <(grep -v '^#' "$packages_file")
declare -A installed_version=()  # of the packages that dpkg has

# dpkg-query fails when one of the packages is one that it has never met, and still tells about the others.
read_installed() {
  local name status version
  while read -r name status version; do
    [[ $status != installed ]] || installed_version[$name]=$version
  done < <(dpkg-query -W -f '${Package} ${db:Status-Status} ${Version}\n' "${!pattern_of[@]}" 2>/dev/null || true)
}

fits() {  # VERSION PATTERN
  # shellcheck disable=SC2053  # the right-hand side is meant as a pattern
  [[ $1 == $2 ]]
}

# Whether any of PROBES shows the thing without dpkg: libraries of one's own in CMAKE_PREFIX_PATH or NAME_ROOT, modules.
shown() {  # PROBES NAMES
  local probe what folder name folders=() includes=()
  IFS=: read -r -a folders <<<"${CMAKE_PREFIX_PATH:-}"
  for name in $2; do
    name=${name//-/_}_ROOT
    folders+=("${!name:-}")
    name=${name^^}
    folders+=("${!name:-}")
  done
  for folder in "${folders[@]}"; do [[ -z $folder ]] || includes+=(-I "$folder/include"); done
  for probe in ${1//,/ }; do
    what=${probe#*:}
    case $probe in
      command:*) command -v "$what" >/dev/null && return ;;
      header:*) c++ -E "${includes[@]}" -x c++ - <<<"#include <$what>" >/dev/null 2>&1 && return ;;
      python:*) python3 -c "import $what" 2>/dev/null && return ;;
    esac
  done
  return 1
}

# USE: names of the packages for it (program, tests) that are not here.
missing_packages() {
  local name pattern use probes names
  while read -r name pattern use probes names; do
    [[ $use == "$1" ]] || continue
    [[ -z ${installed_version[$name]:-} ]] || continue
    if [[ $packages -eq 0 ]] && shown "$probes" "$names"; then continue; fi
    echo "$name"
  done < <(grep -v '^#' "$packages_file")
}

note_other_versions() {
  local name pattern use version
  while read -r name pattern use _; do
    [[ $use == program || $program_only -eq 0 ]] || continue
    version=${installed_version[$name]:-}
    if [[ -n $version ]] && ! fits "$version" "$pattern"; then
      say "note: $name $version is installed; upmoe is developed with ${pattern%\*}. Going on with what is there."
    fi
  done < <(grep -v '^#' "$packages_file")
}

declare -A offered_version=()  # what apt's package lists have that fits the list

read_offered() {  # NAME...
  local name version
  while read -r name version; do
    # Where apt knows sources too, it names those of a package as well: googletest beside libgtest-dev.
    [[ -n ${pattern_of[$name]:-} ]] || continue
    if fits "$version" "${pattern_of[$name]}"; then offered_version[$name]=${offered_version[$name]:-$version}; fi
  done < <(apt-cache madison "$@" 2>/dev/null | tr -d ' ' | tr '|' ' ' | cut -d ' ' -f 1,2)
}

may_install() {  # with a password that someone can type, or without
  [[ $(id -u) -eq 0 ]] || { command -v sudo >/dev/null && { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; }
}

as_root() {
  local kept=(DEBIAN_FRONTEND=noninteractive LC_ALL=C) name
  for name in http_proxy https_proxy no_proxy; do [[ -z ${!name:-} ]] || kept+=("$name=${!name}"); done
  if [[ $(id -u) -eq 0 ]]; then env "${kept[@]}" "$@"; else sudo env "${kept[@]}" "$@"; fi
}

# COMMAND...: as root, its words to build/apt.log. Waits while another apt or dpkg works.
package_step() {
  local began=$SECONDS said=0 words=$packages_log.part status
  while true; do
    status=0
    as_root "$@" >"$words" 2>&1 || status=$?
    { echo "\$ $*"; cat "$words"; } >>"$packages_log"
    if [[ $status -eq 0 ]] || ! grep -qE 'Could not get lock|Unable to (lock|acquire)|was locked by another' "$words" ||
      [[ $((SECONDS - began)) -ge $LOCK_PATIENCE ]]; then
      rm -f "$words"
      return "$status"
    fi
    [[ $said -eq 1 ]] || say "another program installs packages here; waiting for it"
    said=1
    sleep 5
  done
}

install_packages() {  # NAME...
  local name version requests=()
  : >"$packages_log"
  # What a killed dpkg left half-done; apt refuses to work before. Nothing to do otherwise.
  package_step dpkg --configure -a || true
  package_step apt-get install -y -q --fix-broken || true
  offered_version=()
  read_offered "$@"
  if [[ ${#offered_version[@]} -lt $# ]]; then
    # A source of packages that fails may be one that nothing here comes from; the installation tells.
    package_step apt-get update -q || say "note: apt-get update reports problems (build/apt.log)"
    read_offered "$@"
  fi
  for name in "$@"; do
    version=${offered_version[$name]:-}
    if [[ -n $version ]]; then
      requests+=("$name=$version")
    else
      say "note: this system does not offer $name ${pattern_of[$name]}; taking its own version"
      requests+=("$name")
    fi
  done
  package_step apt-get install -y -q --no-install-recommends "${requests[@]}"
}

provide_packages() {
  local missing=() command
  ! has_dpkg || read_installed
  mapfile -t missing < <(missing_packages program; [[ $program_only -eq 1 ]] || missing_packages tests)
  note_other_versions
  [[ ${#missing[@]} -gt 0 ]] || return 0
  command="apt-get install --no-install-recommends ${missing[*]}"
  has_dpkg || [[ $packages -eq 0 ]] ||
    die "not a Debian system. Install what Debian calls ${missing[*]} by its own means, and use --no-packages"
  [[ $packages -eq 1 ]] ||
    die "missing: ${missing[*]}. Install them (on Debian: $command) or, where they lie in a folder of their own, name" \
      "it in CMAKE_PREFIX_PATH"
  may_install || die "missing: ${missing[*]}. Not root and no sudo here. Ask an administrator to run: $command"
  say "installing Debian packages: ${missing[*]}"
  # Package lists that are older than the index ask for versions that it no longer has: once more with new ones.
  install_packages "${missing[@]}" || { package_step apt-get update -q; install_packages "${missing[@]}"; } ||
    { tail -n 20 "$packages_log" >&2; die "apt-get install failed; the whole log is build/apt.log"; }
}
