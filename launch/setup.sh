# Sourced by the other scripts: a virtual environment with the package.
#
#   EXTRAS   to install, as in dev,tpu; an environment that has more will do
#   VENV     where (.venv); a relative path counts from the repository
#   PYTHON   interpreter (that of the environment, or python3 for a new one)
#   INSTALL  no: fail when something is missing, on nodes without a network

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV

fail() {
  echo "error: $1" >&2
  exit 1
}

# The extras of a comma-separated list: one a line, sorted, each once.
list_extras() {
  tr ', ' '\n\n' <<< "$1" | sed '/^$/d' | sort -u
}

# Succeeds if $VENV/installed lists all that is asked for. It has three lines:
# the Python, the extras, and what they were installed from and to.
is_installed() {
  local python extras source
  [[ -x $VENV/bin/python && -f $VENV/installed ]] || return 1
  { read -r python && read -r extras && read -r source; } \
    < "$VENV/installed" || return 1
  [[ $source == "$(cksum < pyproject.toml) $PWD $VENV" ]] || return 1
  [[ -z ${PYTHON:-} || $python == "$("$PYTHON" --version)" ]] || return 1
  [[ -z $(comm -23 <(list_extras "${EXTRAS:-}") <(list_extras "$extras")) ]]
}

install_package() {
  local python='' extras='' kept extra version
  for extra in $(list_extras "${EXTRAS:-}"); do
    grep -q "^$extra = \[" pyproject.toml \
      || fail "EXTRAS=$EXTRAS: pyproject.toml has no extra '$extra'"
  done
  if [[ -f $VENV/installed && -x $VENV/bin/python ]]; then
    { read -r python && read -r kept; } < "$VENV/installed" || true
  fi
  version=$("${PYTHON:-$VENV/bin/python}" --version 2> /dev/null) || version=none
  if [[ $python == "$version" ]]; then
    extras=$kept # add to the environment
    python=
  else
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      || fail "$python is older than Python 3.11; set PYTHON=python3.x"
    version=$("$python" --version)
  fi
  extras=$(list_extras "${EXTRAS:-},$extras" | paste -sd, -)
  echo "Installing efficient_attn into $VENV (once) ..."
  rm -f "$VENV/installed" # an interrupted installation is none
  if command -v uv > /dev/null; then
    [[ -z $python ]] \
      || uv venv --quiet --allow-existing --python "$python" "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" -e ".${extras:+[$extras]}"
  else
    [[ -z $python ]] || "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet -e ".${extras:+[$extras]}"
  fi
  printf '%s\n' "$version" "$extras" \
    "$(cksum < pyproject.toml) $PWD $VENV" > "$VENV/installed.new"
  mv "$VENV/installed.new" "$VENV/installed"
}

if ! is_installed; then
  [[ ${INSTALL:-} != no ]] || fail "$VENV is missing or out of date; run on a \
node with internet access: ${EXTRAS:+EXTRAS=$EXTRAS }bash launch/setup.sh"
  mkdir -p "$VENV"
  ( # one at a time; the others wait and find it done
    ! command -v flock > /dev/null || flock 9
    if ! is_installed; then install_package; fi
  ) 9> "$VENV/lock"
fi
export PATH="$VENV/bin:$PATH"
