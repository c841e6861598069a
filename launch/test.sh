#!/usr/bin/env bash
# Installs and runs the test suite, or the tests that are named; with --all
# also the exhaustive sweep over lengths, chunks and options.
#
#   bash launch/test.sh [--all] [pytest arguments]

EXTRAS=dev,${EXTRAS:-} source "$(dirname "$0")/setup.sh"
python -m pytest -n "${TEST_WORKERS:-auto}" "$@"
