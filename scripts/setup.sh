#!/usr/bin/env bash
# Makes .venv and installs atomeq into it: bash scripts/setup.sh [run|test|dev|docs]
# The other scripts call it first. A stamp in .venv remembers what was installed, so that a second
# run installs nothing; it is void as soon as pyproject.toml or this file changes.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_VERSION=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: atomeq needs Python 3.11 or newer; none of \$PYTHON, python3, python3.11 ... is one." >&2
  echo "setup: install it, or name it: PYTHON=/path/to/python3.11 bash scripts/demo.sh" >&2
  return 1
}

install_torch() {
  if "$venv_python" -c "import torch" 2>/dev/null; then
    return # a working torch of the user's own choice stays
  fi
  if nvidia-smi -L >/dev/null 2>&1 || [ "$(uname -s)" != Linux ]; then
    pip_install "torch==$TORCH_VERSION"
    return
  fi
  # On Linux the plain wheel brings gigabytes of CUDA libraries. The CPU build may stand in a local
  # wheel folder or mirror; PyTorch's own index is asked only where it does not.
  pip_install "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
    pip_install "torch==$TORCH_VERSION+cpu" --extra-index-url "$TORCH_CPU_INDEX"
}

pip_install() {
  "$venv_python" -m pip install --disable-pip-version-check "$@"
}

wanted=${1:-run}
case "$wanted" in
  run) enough="run test dev docs" groups=() ;;
  test) enough="test dev" groups=(--group test) ;;
  dev) enough="dev" groups=(--group dev) ;;
  docs) enough="docs" groups=(--group docs) ;;
  *)
    echo "setup: '$wanted' is none of run, test, dev, docs" >&2
    exit 2
    ;;
esac

venv_python=.venv/bin/python
key=$(cat pyproject.toml scripts/setup.sh | cksum)
if [ -f .venv/made-in ] && [ "$(cat .venv/made-in)" != "$(pwd -P)" ]; then
  echo "setup: this folder was moved or copied, and .venv holds its old path: making it anew"
  rm -rf .venv
fi
for level in $enough; do
  if [ "$(cat ".venv/installed-$level" 2>/dev/null)" = "$key" ]; then
    exit 0
  fi
done

echo "setup: installing atomeq into .venv (once; a few minutes, most of them torch's download)"
if ! "$venv_python" -c "" 2>/dev/null; then
  python=$(find_python)
  "$python" -m venv --clear .venv
  pwd -P >.venv/made-in
fi
pip_install --quiet --upgrade "pip>=25.1" # the first one that knows --group
install_torch
pip_install --quiet --editable . ${groups[@]+"${groups[@]}"}
echo "$key" >".venv/installed-$wanted"
echo "setup: done"
