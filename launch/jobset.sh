#!/usr/bin/env bash
# Fills in launch/jobset.yaml and gives it to Kubernetes (JobSet: https://jobset.sigs.k8s.io).
# Usage: IMAGE=REGISTRY/saejax:TAG NODES=4 CLAIM=shared launch/jobset.sh [--dry-run] CONFIG RUN_DIR [--config.KEY=VALUE ...]
# NODES: machines of GPUS (8) GPUs each, one process per machine. CLAIM: a ReadWriteMany volume claim, mounted at /shared.
# COMMAND: run (default), scaling, harvest or train.
set -euo pipefail
dry_run=
if [ "${1-}" = --dry-run ]; then dry_run=1; shift; fi
: "${IMAGE:?the container image}" "${NODES:?how many machines}" "${CLAIM:?the volume claim of the shared storage}"
config=${1:?a config file} run_dir=${2:?a run directory below /shared}
shift 2
name=${NAME:-saejax-$(basename "$run_dir" | tr -c 'a-z0-9\n' '-')}

arguments=
for argument in "--config=$config" "--config.run_dir=$run_dir" "$@"; do
  case $argument in *[\'\\]* | *$'\n'*) echo "launch/jobset.sh: no quotes, backslashes or newlines: $argument" >&2; exit 2 ;; esac
  arguments+=", '$argument'"
done
text=$(<"$(dirname "$0")/jobset.yaml")
for pair in "NAME=$name" "IMAGE=$IMAGE" "NODES=$NODES" "GPUS=${GPUS:-8}" "CLAIM=$CLAIM" "COMMAND=${COMMAND:-run}" \
  "ARGUMENTS=$arguments"; do
  text=${text//"{{${pair%%=*}}}"/"${pair#*=}"}
done
if [ -n "$dry_run" ]; then printf '%s\n' "$text"; else printf '%s\n' "$text" | kubectl apply -f -; fi
