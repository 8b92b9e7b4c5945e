#!/usr/bin/env bash
# The tests, on two processes: bash scripts/test.sh [any pytest option, e.g. tests/graph -n 0]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test

# The test of the screening report needs a browser, and skips without one. Nothing is installed on
# a machine that did not ask: ATOMEQ_TEST_BROWSER=1 does, as root by apt-get, else by playwright.
export PLAYWRIGHT_BROWSERS_PATH=$PWD/.venv/browsers
install_browser() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1
  else
    .venv/bin/python -m playwright install chromium >/dev/null 2>&1
  fi
}
if ! command -v chromium >/dev/null && [ ! -d "$PLAYWRIGHT_BROWSERS_PATH" ]; then
  if [ "${ATOMEQ_TEST_BROWSER:-${CI:-}}" ]; then
    echo "test: installing Chromium"
    install_browser || echo "test: Chromium cannot be installed here; the browser test skips"
  else
    echo "test: no Chromium; the browser test skips (ATOMEQ_TEST_BROWSER=1 installs one)"
  fi
fi

export OMP_NUM_THREADS=1 # two test processes must not fight for the cores
exec .venv/bin/python -m pytest -n 2 "$@"
