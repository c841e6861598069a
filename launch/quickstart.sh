#!/usr/bin/env bash
# Installs, trains a small hybrid language model on the CPU in about two minutes,
# and shows what it learned.
#
#   bash launch/quickstart.sh [--config.key=value ...]

source "$(dirname "$0")/setup.sh"

workdir=runs/quickstart
python launch/train.py --config=configs/lm/quickstart.py --workdir=$workdir "$@"
echo
echo "A sample, prompted with 'def ':"
echo
python launch/sample.py --workdir=$workdir --prompt='def ' --length=300
echo
echo "Loss plot:    $workdir/loss.png"
echo "TensorBoard:  $workdir/tensorboard"
echo "Checkpoint:   $workdir/checkpoints/$(ls $workdir/checkpoints | sort -n | tail -n 1)"
