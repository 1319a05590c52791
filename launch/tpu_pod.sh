#!/usr/bin/env bash
# One job on every host of a Cloud TPU slice. Usage: TPU=my-slice ZONE=us-central2-b launch/tpu_pod.sh CONFIG RUN_DIR [--config.KEY=VALUE ...]
# The hosts find each other by themselves; RUN_DIR must be storage that all of them see (a mounted bucket or filestore).
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"
config=${1:?a config file} run_dir=${2:?a run directory on shared storage}
shift 2

repository=${REPOSITORY:-$(git remote get-url origin)}
revision=${REVISION:-$(git rev-parse HEAD)}
arguments=$(printf '%q ' run --distributed "--config=$config" "--config.run_dir=$run_dir" "$@")

# A preempted slice is started again with the same command: exit code 75 means that the state was saved.
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
  set -e
  test -d saejax || git clone $(printf %q "$repository") saejax
  cd saejax && git fetch --quiet && git checkout --quiet $revision
  test -x .venv/bin/saejax || { python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'; }
  .venv/bin/saejax $arguments"
