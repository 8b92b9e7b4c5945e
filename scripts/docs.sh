#!/usr/bin/env bash
# The documentation as a site: bash scripts/docs.sh [any option of sphinx-build]
# Executes the tutorials and writes docs/_build/html/index.html; a warning is an error. Some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh docs
rm -rf docs/_build
.venv/bin/python -m sphinx --fail-on-warning --keep-going -b html "$@" docs docs/_build/html
echo "docs: docs/_build/html/index.html"
