#!/usr/bin/env bash
# The main job in under three minutes, with the potential that comes with atomeq: a single point,
# relaxations, an equation of state and molecular dynamics of copper. Writes demo_out/demo.png.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh run
exec .venv/bin/python scripts/demo.py "$@"
