# shellcheck shell=bash
# mpirun as a child that a signal to the script does not take along: the ranks are asked to save first. Left to itself
# mpirun kills them a second after SIGTERM or Ctrl-C. Sourced by run_local.sh and run_hosts.sh, which set stop_grace
# (seconds for a checkpoint; 0: the command saves nothing, end it at once) and define say.

: "${stop_grace:?set by the script that sources this}"
mpirun_pid=0
stopping=0  # 1: somebody asked for the end
stop_by=-1  # when mpirun is ended, in bash's SECONDS; -1: not yet
kill_by=-1  # when it is ended by force
asked_at=0  # time of the first request, microseconds

# Of a command that is not there mpirun's status looks like a signal.
require_program() {
  command -v "$1" >/dev/null || { say "error: $1: no such program; launch/setup.sh makes build/release/upmoe"; exit 2; }
}
# What Open MPI needs of its surroundings; it hands OMPI_* on to other hosts by itself.
prepare_mpi() {
  if [[ $(id -u) -eq 0 ]]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
  if [[ -e /.dockerenv || -e /run/.containerenv ]]; then
    # Containers usually forbid reading another process's memory; without this Open MPI fails on large messages.
    export OMPI_MCA_btl_vader_single_copy_mechanism=${OMPI_MCA_btl_vader_single_copy_mechanism:-none}
  fi
}
alive() { [[ $mpirun_pid -ne 0 ]] && kill -0 "$mpirun_pid" 2>/dev/null; }
# mpirun leads its own process group, so that its rsh agents end with it.
end_mpirun() { kill "-$1" -- "-$mpirun_pid" 2>/dev/null || true; }
pass_on() { if alive; then kill "-$1" "$mpirun_pid" 2>/dev/null || true; fi; }
ask_to_stop() {
  local now=${EPOCHREALTIME/[.,]/}
  if ((stopping == 0)); then
    stopping=1 asked_at=$now stop_by=$((SECONDS + stop_grace))
    if ((stop_grace == 0)); then return; fi
    say "stopping: asking the ranks for a checkpoint, at most $stop_grace s; once more to stop at once"
    pass_on USR2
  elif ((now - asked_at >= 500000)); then  # sooner is the same request twice, as `timeout` and a terminal send it
    stop_by=$SECONDS
  fi
}
trap 'pass_on USR1' USR1
trap 'stopping=1; pass_on USR2' USR2
trap ask_to_stop TERM INT HUP
trap '' PIPE  # a reader that is gone, or a closed terminal, is no reason to leave the ranks alone

# Starts mpirun; sets mpirun_pid. In a session of its own: Ctrl-C in the terminal must reach the script alone. It ends
# with the script, also when that is killed by force.
start_mpirun() {  # ARGUMENT...
  local with=(setsid)
  if command -v setpriv >/dev/null; then with+=(setpriv --pdeathsig TERM); fi
  if [[ -t 0 ]]; then
    "${with[@]}" mpirun "$@" </dev/null &
  else
    "${with[@]}" mpirun "$@" <&0 &
  fi
  mpirun_pid=$!
}

# Ends mpirun when its time is over; called about five times a second.
end_when_due() {
  if ((stop_by >= 0 && SECONDS >= stop_by)); then
    end_mpirun TERM
    stop_by=-1 kill_by=$((SECONDS + 5))
  elif ((kill_by >= 0 && SECONDS >= kill_by)); then
    end_mpirun KILL
  fi
}
