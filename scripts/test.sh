#!/usr/bin/env bash
# The tests, on two processes: bash scripts/test.sh [any pytest option, e.g. tests/graph -n 0]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
export OMP_NUM_THREADS=1 # two test processes must not fight for the cores
exec .venv/bin/python -m pytest -n 2 "$@"
