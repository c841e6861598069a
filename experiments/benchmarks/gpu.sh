#!/usr/bin/env bash
# Measures what waits for a GPU (gpu.py lists it), in under 8 minutes on one.
#
#   OUT=runs/gpu [WHEELS=folder] bash experiments/benchmarks/gpu.sh
#
# Run it again for the parts that OUT lacks. Nothing is fetched: the packages
# are those of PYTHON (python3) and, if it is given, the wheels of WHEELS.

set -euo pipefail
OUT=${OUT:-runs/gpu}
[[ $OUT == /* ]] || OUT=$PWD/$OUT
WHEELS=${WHEELS:+$(cd "$WHEELS" && pwd)}
python=$(command -v "${PYTHON:-python3}")
[[ $python == /* ]] || python=$PWD/$python
cd "$(dirname "$0")/../.."

# `python` of the commands, by a script: a link would lose its packages.
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT
printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" > "$programs/python"
chmod +x "$programs/python"
export OUT PATH="$programs:$PATH" PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
if [[ -n $WHEELS ]]; then
  python -m pip install --quiet --no-index --no-deps \
    --no-compile --target "$programs/site" "$WHEELS"/*.whl
  PYTHONPATH=$PYTHONPATH:$programs/site
fi
# Calls that follow find what this one compiled.
export JAX_COMPILATION_CACHE_DIR=${TMPDIR:-/tmp}/efficient_attn_compiled
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PLATFORMS=cuda,cpu # a GPU that JAX cannot use is an error
export XLA_PYTHON_CLIENT_MEM_FRACTION=.92
python -m experiments.benchmarks.gpu "$@"
