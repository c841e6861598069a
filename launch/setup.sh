# Sourced by the other scripts: a virtual environment in .venv with the package.
#
#   EXTRAS  extra to install, e.g. dev; PYTHON  interpreter to use (python3).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $PYTHON is older than Python 3.11; set PYTHON=python3.x" >&2
  exit 1
fi

wanted="$("$PYTHON" --version) ${EXTRAS:-} $(cksum < pyproject.toml)"
if [ "$(cat "$VENV/installed" 2> /dev/null)" != "$wanted" ]; then
  echo "Installing efficient_attn into $VENV (once) ..."
  if command -v uv > /dev/null; then
    uv venv --quiet --allow-existing --python "$PYTHON" "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" -e ".${EXTRAS:+[$EXTRAS]}"
  else
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet -e ".${EXTRAS:+[$EXTRAS]}"
  fi
  echo "$wanted" > "$VENV/installed"
fi
export PATH="$PWD/$VENV/bin:$PATH"
