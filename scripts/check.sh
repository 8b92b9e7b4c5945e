#!/usr/bin/env bash
# Everything that can be said about the code without running it; CI and pre-commit run the same.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
PATH="$PWD/.venv/bin:$PATH"

failed=()
check() {
  echo "check: $*"
  "$@" || failed+=("$*")
}
check ruff check .
check ruff format --check .
check pyright
check lint-imports --no-logo
# what git ignores is not ours: a built site, a virtual environment, runs
check bash -c "git ls-files -z --cached --others --exclude-standard | xargs -0 codespell"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'check: FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "check: all clean"
