#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM slice; run it where gcloud is set up:
#
#   TPU=my-slice ZONE=us-west4-a launch/tpu_pod.sh --config=configs/lora.py --config.data.train=...
#
# TPU and ZONE name the slice, PROJECT its project if it is not gcloud's own. FOLDER is where
# jaxtune lies on every host, with its environment in .venv (default: jaxtune in the home folder).
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?zone of the TPU VM}"
folder=${FOLDER:-jaxtune}

where=(--zone="$ZONE" --worker=all)
if [ -n "${PROJECT:-}" ]; then where+=(--project="$PROJECT"); fi
printf -v arguments ' %q' "$@"
printf -v enter 'cd %q' "$folder"
exec gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" \
  --command="$enter && exec .venv/bin/python -m jaxtune.train$arguments"
