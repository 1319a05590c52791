#!/usr/bin/env bash
# Several TPU slices as one job on a GKE cluster, through xpk (pip install xpk).
# Usage: CLUSTER=NAME ZONE=us-east5-a PROJECT=NAME TPU_TYPE=v5p-128 SLICES=2 IMAGE=REGISTRY/saejax:TAG \
#          launch/xpk_multislice.sh [--dry-run] CONFIG RUN_DIR [--config.KEY=VALUE ...]
# The image is made from launch/Containerfile with EXTRA=tpu. Keep config.mesh.dict inside a slice and let config.mesh.data be a
# multiple of SLICES: between slices only gradients then cross the slower network.
# COMMAND: run (default), scaling, harvest or train.
set -euo pipefail
dry_run=
if [ "${1-}" = --dry-run ]; then dry_run=1; shift; fi
: "${CLUSTER:?name of the GKE cluster}" "${ZONE:?its zone}" "${PROJECT:?its project}" "${TPU_TYPE:?type of a slice, as v5p-128}"
: "${IMAGE:?the container image}"
config=${1:?a config file} run_dir=${2:?a run directory on shared storage}
shift 2
workload=${WORKLOAD:-saejax-$(basename "$run_dir" | tr -c 'a-z0-9\n' '-')}
line=(xpk workload create --cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT" --workload "$workload"
  --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" --docker-image "$IMAGE" --max-restarts "${RESTARTS:-20}"
  --command "$(printf '%q ' saejax "${COMMAND:-run}" --distributed "--config=$config" "--config.run_dir=$run_dir" "$@")")
if [ -n "$dry_run" ]; then
  printf '%q ' "${line[@]}"
  echo
else
  "${line[@]}"
fi
