#!/usr/bin/env bash
# Installs and runs the whole test suite, or the tests that are named.
#
#   bash launch/test.sh [pytest arguments]

EXTRAS=${EXTRAS:-dev} source "$(dirname "$0")/setup.sh"
python -m pytest -n "${TEST_WORKERS:-auto}" "$@"
