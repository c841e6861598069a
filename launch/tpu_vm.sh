#!/usr/bin/env bash
# Trains on every host of a TPU VM slice, with the code of the last commit.
#
#   TPU=name ZONE=europe-west4-b CONFIG=configs/lm/quickstart.py \
#     WORKDIR=/mnt/runs/a bash launch/tpu_vm.sh [--config.key=value ...]
#
# The hosts need Python >= 3.11 (PYTHON says which) and WORKDIR on a file system
# that they share. The same command continues a run; to stop it, send
#   gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all \
#     --command='pkill -TERM -f [l]aunch/train.py'

set -euo pipefail
cd "$(dirname "$0")/.."

train=(
  python launch/train.py --config="${CONFIG:-configs/lm/quickstart.py}"
  --workdir="$WORKDIR" "$@"
)
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
archive=$folder/efficient_attn.tar.gz
git archive --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:" --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  set -e
  mkdir -p efficient_attn
  tar -xzf efficient_attn.tar.gz -C efficient_attn
  cd efficient_attn
  EXTRAS=tpu ${PYTHON:+PYTHON=$(printf %q "$PYTHON")} source launch/setup.sh
  JAX_COORDINATOR_ADDRESS=auto $(printf '%q ' "${train[@]}")"
