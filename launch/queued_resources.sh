#!/bin/bash
# Google Cloud, TPUs as queued resources: one process per host. JAX finds the processes by itself.
#
#     NAME=storm ZONE=us-east5-a launch/queued_resources.sh --config=configs/storm_qwen2_7b.py:stage=sft --workdir=/shared/runs/sft
#
# Every host needs this repository in ~/storm, with its requirements and jax[tpu], and a shared folder: see
# docs/scaling.md. The same command resumes, also after a spot TPU was taken away and created again.
set -euo pipefail
TYPE=${TYPE:-v5p-128} RUNTIME=${RUNTIME:-v2-alpha-tpuv5}

gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" >/dev/null 2>&1 ||
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot
until gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' | grep -q ACTIVE; do
    sleep 60
done
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="cd storm && exec python -u train.py $(printf '%q ' "$@")"
