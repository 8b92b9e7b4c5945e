#!/usr/bin/env bash
# The main job in under three minutes: a single point, relaxations, an equation of state and dynamics of
# copper with a potential that comes with atomeq, equations of state of seven more elements with others;
# then MgO, Si, NaCl, LiCoO2 and TiO2 with the published sevennet-0, installed by name where the package
# index can be reached (or from a wheel: --wheel FILE). Writes demo_out/demo.png and demo_out/crystals.png.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh run
exec .venv/bin/python scripts/demo.py "$@"
