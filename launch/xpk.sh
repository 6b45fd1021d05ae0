#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through XPK; run it where `pip install xpk` and gcloud are set up:
#
#   CLUSTER=my-cluster NAME=first-run DEVICES=v5litepod-16 IMAGE=me/jaxtune launch/xpk.sh --config=...
#
# CLUSTER, NAME, DEVICES and IMAGE name the cluster, the workload, the slice's type, and a container
# image with jaxtune in its Python. SLICES is their number (default 1), RESTARTS how often the job
# may start again, resuming from its last checkpoint, after a stop (75) or a lost host (70, 71;
# default 3): train.output_dir must lie on a disk that all hosts share.
set -euo pipefail
: "${CLUSTER:?GKE cluster}" "${NAME:?name of the workload}" "${DEVICES:?e.g. v5litepod-16}"
: "${IMAGE:?container image with jaxtune}"

printf -v arguments ' %q' "$@"
exec xpk workload create --cluster="$CLUSTER" --workload="$NAME" --device-type="$DEVICES" \
  --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts="${RESTARTS:-3}" --restart-on-exit-codes=70,71,75 \
  --command="python -m jaxtune.train$arguments"
