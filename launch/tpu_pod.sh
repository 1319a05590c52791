#!/usr/bin/env bash
# A Cloud TPU slice as a queued resource: asks for it, waits, runs one job on all of its hosts, and starts again after preemption.
# Usage: TPU=NAME ZONE=us-east5-a ACCELERATOR=v5p-128 launch/tpu_pod.sh [--dry-run] CONFIG RUN_DIR [--config.KEY=VALUE ...]
# RUN_DIR must be storage that all hosts see (a mounted bucket or filestore). SPOT=1 asks for preemptible chips; RUNTIME is the
# image of the hosts; REPOSITORY and REVISION are what they install (default: this checkout's origin and commit).
# COMMAND: run (default), scaling, harvest or train.
set -euo pipefail
dry_run=
if [ "${1-}" = --dry-run ]; then dry_run=1; shift; fi
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}" "${ACCELERATOR:?its type, as v5p-128}"
config=${1:?a config file} run_dir=${2:?a run directory on shared storage}
shift 2
runtime=${RUNTIME:-v2-alpha-tpuv5}
repository=${REPOSITORY:-$(git remote get-url origin)}
revision=${REVISION:-$(git rev-parse HEAD)}
arguments=$(printf '%q ' "${COMMAND:-run}" --distributed "--config=$config" "--config.run_dir=$run_dir" "$@")
on_host="set -e
test -d saejax || git clone $(printf %q "$repository") saejax
cd saejax && git fetch --quiet && git checkout --quiet $(printf %q "$revision")
test -x .venv/bin/saejax || { python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'; }
.venv/bin/saejax $arguments"

gcloud_tpu() {  # group, verb, arguments: prints the command instead where asked to
  local line=(gcloud compute tpus "$@" --zone "$ZONE")
  if [ -n "$dry_run" ]; then printf '%q ' "${line[@]}"; echo; else "${line[@]}"; fi
}

state() { gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" --format='value(state.state)' 2>/dev/null || true; }

ask() {
  gcloud_tpu queued-resources create "$TPU" --node-id "$TPU" --accelerator-type "$ACCELERATOR" --runtime-version "$runtime" \
    ${SPOT:+--spot}
}

run_on_all() { gcloud_tpu tpu-vm ssh "$TPU" --worker=all --command "$on_host"; }

if [ -n "$dry_run" ]; then
  ask
  run_on_all
  gcloud_tpu queued-resources delete "$TPU" --force --quiet
  exit
fi

while true; do
  case "$(state)" in
    "") ask ;;
    ACTIVE)
      status=0
      run_on_all || status=$?
      # 0: done. 2: a mistake in config or flags, which another start would not repair. Else stopped or preempted: again.
      if [ "$status" = 0 ] || [ "$status" = 2 ]; then exit "$status"; fi
      echo "launch/tpu_pod.sh: exit code $status; starting again" >&2
      ;;
    SUSPENDED | SUSPENDING | FAILED) gcloud_tpu queued-resources delete "$TPU" --force --quiet ;;
  esac
  sleep "${POLL_SECONDS:-30}"
done
