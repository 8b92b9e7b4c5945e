#!/usr/bin/env bash
# What a release is made of, tried as a stranger would: bash scripts/release_check.sh [FOLDER]
# Builds wheel and sdist into dist/, builds a wheel of the sdist alone and compares the two, installs
# the wheel into an empty environment in FOLDER (by default a temporary one, removed at the end) and
# computes copper there, away from this folder. Takes some minutes, most of them torch's.
set -euo pipefail
cd "$(dirname "$0")/.."
source_folder=$PWD
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1)
if [ $# -gt 0 ]; then
  work=$(mkdir -p "$1" && cd "$1" && pwd)
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "release_check: atomeq needs Python 3.11 or newer; name one: PYTHON=..." >&2
  return 1
}
python=$(find_python)

echo "release_check: building atomeq $version"
"$python" -m venv --clear "$work/build"
"$work/build/bin/python" -m pip install --quiet --disable-pip-version-check "pip>=25.1" hatchling
rm -f dist/"atomeq-$version"*
"$work/build/bin/python" -m hatchling build -d dist >/dev/null
wheel=$(ls dist/"atomeq-$version"-*.whl)
sdist=dist/atomeq-$version.tar.gz

echo "release_check: the sdist alone makes the same wheel"
"$work/build/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
  --wheel-dir "$work/from-sdist" "$sdist"
"$work/build/bin/python" - "$wheel" "$work/from-sdist/$(basename "$wheel")" <<'PY'
import sys
import zipfile

one, other = ({i.filename: i.CRC for i in zipfile.ZipFile(path).infolist()} for path in sys.argv[1:])
differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
if differing:
    sys.exit(f"release_check: wheel and sdist differ in {differing}")
print(f"release_check: {len(one)} files in the wheel, {sys.argv[1]}")
PY

echo "release_check: installing the wheel into an empty environment"
"$python" -m venv --clear "$work/empty"
torch=$(sed -n 's/^TORCH_VERSION=//p' scripts/setup.sh)
pip_install() { "$work/empty/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip_install "torch==$torch+cpu" 2>/dev/null || pip_install "torch==$torch"
pip_install "$wheel"

cd "$work"
unset PYTHONPATH
echo "release_check: atomeq single-point, away from $source_folder"
empty/bin/python -c 'from ase.build import bulk; bulk("Cu", cubic=True).write("cu.cif")'
empty/bin/atomeq single-point cu.cif --potential cu-pbe --out cu.extxyz --overwrite
empty/bin/python - <<'PY'
import sys
from pathlib import Path

import ase.io

import atomeq

assert Path(atomeq.__file__).is_relative_to(sys.prefix), f"{atomeq.__file__} is not the wheel's"
energy = ase.io.read("cu.extxyz").get_potential_energy() / 4
assert -4.5 < energy < -3.0, f"{energy} eV per atom is not the cohesive energy of copper"
print(f"release_check: {atomeq.__version__} from {atomeq.__file__}: {energy:.4f} eV per atom")
PY
echo "release_check: passed"
