#!/usr/bin/env bash
# Installs and runs the test suite, or the tests that are named (paths, -k).
# The suite has some cases of every property; with --rotate also those whose
# turn it is at this commit, of the exhaustive sweep over lengths, chunks and
# options too; with --all everything. See tests/rotation.py.
#
#   bash launch/test.sh [--all | --rotate | --part=K/N] [pytest arguments]

EXTRAS=dev,${EXTRAS:-} source "$(dirname "$0")/setup.sh"

# What a part takes is what the sweep takes divided by this number.
PARTS=16
arguments=()
for argument in "$@"; do
  if [ "$argument" = --rotate ]; then
    commit=$(git rev-parse --short=7 HEAD)
    argument=--part=$((16#$commit % PARTS))/$PARTS
    echo "The turn of commit $commit: --rotate is $argument"
  fi
  arguments+=("$argument")
done
python -m pytest -n "${TEST_WORKERS:-auto}" "${arguments[@]}"
