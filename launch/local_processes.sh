#!/usr/bin/env bash
# N processes with M simulated CPU devices each, one job on this machine, to try out a pod's run.
# Usage: launch/local_processes.sh [--dry-run] N M JOB [saejax's arguments]     for example: ... 2 4 train --config=configs/demo.py
# SAEJAX is the command (default .venv/bin/saejax, else saejax). Exit code: that of the first process that failed.
set -uo pipefail
dry_run=
if [ "${1-}" = --dry-run ]; then dry_run=1; shift; fi
usage="usage: launch/local_processes.sh [--dry-run] N M JOB [arguments]"
processes=${1:?$usage} devices=${2:?$usage}
shift 2
: "${1:?$usage}"
[[ $processes =~ ^[1-9][0-9]*$ && $devices =~ ^[1-9][0-9]*$ ]] || { echo "$usage (N and M: numbers)" >&2; exit 2; }
default=saejax
if [ -x .venv/bin/saejax ]; then default=.venv/bin/saejax; fi
read -ra command <<< "${SAEJAX:-$default}"
port=${PORT:-$((20000 + RANDOM % 20000))}

# A collective that comes from the compilation cache waits for ever under gloo; flags and proxies of the caller do not belong here.
clean=(env -u XLA_FLAGS -u JAX_COMPILATION_CACHE_DIR -u http_proxy -u https_proxy -u HTTP_PROXY -u HTTPS_PROXY
  JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)

children=()
# The processes agree on a last step among themselves: one that is told to stop is enough, all of them do no harm.
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM INT
for ((i = 0; i < processes; i++)); do
  line=("${clean[@]}" "${command[@]}" "$@" --distributed "--coordinator=127.0.0.1:$port" "--num_processes=$processes"
    "--process_id=$i")
  if [ -n "$dry_run" ]; then
    printf '%q ' "${line[@]}"
    echo
  else
    "${line[@]}" &
    children+=("$!")
  fi
done

status=0
for child in "${children[@]}"; do
  wait "$child"
  code=$?
  # A signal interrupts the wait, not the process.
  while [ "$code" -gt 128 ] && kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  if [ "$status" = 0 ]; then status=$code; fi
done
exit "$status"
