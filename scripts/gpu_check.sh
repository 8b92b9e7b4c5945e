#!/usr/bin/env bash
# The CUDA tests and the CUDA benchmark on a machine with one NVIDIA GPU, in under nine minutes.
#   bash scripts/gpu_check.sh          results go to $OUT if that is set, else to scripts/benchmarks/results/
# It needs torch with CUDA and triton in the system's Python ($PYTHON, python3.12, python3), made for
# torch 2.11 with triton 3.6 and for torch 2.13. What else the operations import is taken from there,
# or put beside it into .venv-gpu/site: from ./gpu_wheels where there is that folder, else from
# whatever pip can find. For a bare machine without network, fill the folder before (45 MB):
#   pip download --dest gpu_wheels --python-version 3.12 --only-binary :all: --no-deps \
#     ase vesin e3nn jaxtyping wadler-lindig opt_einsum opt_einsum_fx scipy pyyaml safetensors \
#     rich pytest pluggy iniconfig packaging pygments
# The proof of `atomeq export --device cuda` wants NVIDIA's toolkit too (CUDA_HOME), or skips itself.
# At most 520 s: 90 to install, the rest for the stages of `scripts/benchmark.py gpu`, proofs first.
# Each keeps what it has when its time is over; called again, what has passed with this code is not
# repeated. Options go to that benchmark: `bash scripts/gpu_check.sh --only dynamics`.
#
# Where a new GPU, driver or Triton must be looked at, since the CPU tests can not show it:
#  * correctness: the interpreter runs one program after the other, has no shared memory, no limit of
#    registers, and cuts off where a GPU rounds to bfloat16. The tests marked gpu or triton hold the
#    bars on the device; `scripts/benchmark.py triton-compile LMAX MMAX` shows spills and shared memory.
#  * ops/edge/triton/so2.py: _MANY_EDGES, where cuBLAS takes over from the kernels, _TOGETHER, the
#    tiles of edges that share a tile of weights in the cache, and _tiles; at precision "medium" the
#    kernels serve any number of edges. Tiles of 64 edges and 32 outputs keep gates from spilling, and
#    may be too small for the tensor cores.
#  * `scripts/benchmark.py count-traffic` says what a layer should read and write: a kernel that takes much
#    longer than its bytes at 4.3 TB/s is the one to look at.
#  * ops/triton_launch.py: _REGISTER_TILE (edges of one program); rotation.py and coupling.py:
#    BLOCK_E and num_warps of the sums over an atom's edges, which wait for memory if edges are few;
#    that of couplings spills 64 bytes from lmax = 5 on (every path, 128 channels, float32), that of
#    rotations 48 at lmax = mmax = 6.
#  * ops/sphere/triton/kernels.py: _POINTS, _BYTES; one set of coefficients per program may be too
#    little work at lmax <= 2.
#  * ops/segment/triton/kernels.py: _PIECE and _LONG, from which on a segment is summed by pieces;
#    sums sort their index at every call; edge layers and convolutions do so once.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-scripts/benchmarks/results}
mkdir -p "$out"
export OMP_NUM_THREADS=4
export PYTHONPATH="$PWD:$PWD/.venv-gpu/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
needed="import torch, ase, vesin, e3nn, jaxtyping, numpy, scipy, yaml, safetensors, rich, pytest"

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3 .venv/bin/python; do
    if "$candidate" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "gpu_check: no Python here has a torch that sees a GPU; name one: PYTHON=/path/to/python3" >&2
  return 1
}

python=$(find_python)
if ! "$python" -c "$needed" 2>/dev/null; then
  echo "gpu_check: putting what atomeq needs into .venv-gpu/site, beside the torch of $python"
  wheels=()
  if [ -d gpu_wheels ]; then wheels=(--no-index --find-links gpu_wheels); fi
  # torch and what it brings stay the system's: nothing is installed that is not named here
  timeout 90 "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    "${wheels[@]}" --upgrade --target .venv-gpu/site \
    ase vesin e3nn jaxtyping wadler-lindig opt_einsum opt_einsum_fx scipy pyyaml safetensors \
    rich pytest pluggy iniconfig packaging pygments ||
    echo "gpu_check: pip found not all of it; going on with what is there"
  "$python" -c "import torch, numpy, jaxtyping, e3nn"  # without these nothing runs at all
fi
"$python" -c "import torch, sys; print('gpu_check:', sys.version.split()[0], 'torch', \
torch.__version__, torch.cuda.get_device_name(), file=sys.stderr)"

exec "$python" scripts/benchmark.py gpu --device cuda --quick --out "$out" \
  --seconds $((520 - SECONDS)) "$@"
