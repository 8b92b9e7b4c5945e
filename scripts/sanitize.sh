#!/usr/bin/env bash
# Runs tests/ops with its C kernels under AddressSanitizer and UBSan; ends with "no error".
#   bash scripts/sanitize.sh            all of tests/ops, file by file
#   bash scripts/sanitize.sh so2 wigner the files tests/ops/test_*so2*.py and test_*wigner*.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export CC="gcc -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 # Python frees little at its end
export UBSAN_OPTIONS=print_stacktrace=1
files=()
for part in "${@:-}"; do
  files+=(tests/ops/test_*"$part"*.py)
done
for file in "${files[@]}"; do
  echo "$file"
  "$python" -m pytest "$file" -n 0 -q -x -s || [ $? -eq 5 ] # 5: nothing of it runs on this machine
done
echo "no error"
