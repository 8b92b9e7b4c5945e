#!/usr/bin/env bash
# The CUDA tests and the CUDA benchmark on a machine with one NVIDIA GPU, in under nine minutes.
#   bash scripts/gpu_check.sh          results go to $OUT if that is set, else to scripts/benchmarks/results/
# It needs torch with CUDA and triton in the system's Python ($PYTHON, python3.12, python3), made for
# torch 2.11 with triton 3.6 and for torch 2.13. What else the operations import is taken from there,
# or installed beside it into .venv-gpu: from ./gpu_wheels where there is that folder, else from
# whatever pip can find. For a bare machine without network, fill the folder before (39 MB):
#   pip download --dest gpu_wheels --python-version 3.12 --only-binary :all: --no-deps \
#     ase e3nn jaxtyping wadler-lindig opt_einsum opt_einsum_fx scipy pytest pluggy iniconfig \
#     packaging pygments
# At most 520 s: 90 to install, 200 for the tests, 230 for the benchmark, which keeps what it has.
#
# Where a new GPU, driver or Triton must be looked at, since the CPU tests can not show it:
#  * correctness: the interpreter runs one program after the other, has no shared memory, no limit of
#    registers, and cuts off where a GPU rounds to bfloat16. The tests marked gpu or triton hold the
#    bars on the device; `scripts/benchmark.py triton-compile LMAX MMAX` shows spills and shared memory.
#  * ops/edge/triton/so2.py: _MANY_EDGES, where cuBLAS takes over from the grouped kernel, and
#    _TILE; with matmul precision "medium" the grouped kernel serves any number of edges. With gates
#    it has 254 of 255 registers in single precision ("highest"), none spilled; 172 in TF32.
#  * `scripts/benchmark.py count-traffic` says what a layer should read and write: a kernel that takes much
#    longer than its bytes at 4.3 TB/s is the one to look at.
#  * ops/triton_launch.py: _REGISTER_TILE (edges of one program); rotation.py and coupling.py:
#    BLOCK_E and num_warps of the sums over an atom's edges, which wait for memory if edges are few;
#    that of couplings spills 64 bytes from lmax = 5 on (every path, 128 channels, float32), that of
#    rotations 48 at lmax = mmax = 6.
#  * ops/sphere/triton/kernels.py: _POINTS, _BYTES; one set of coefficients per program may be too
#    little work at lmax <= 2.
#  * segment sums sort their index at every call; edge layers and convolutions do so once.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-scripts/benchmarks/results}
mkdir -p "$out"
export OMP_NUM_THREADS=4
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
needed="import torch, ase, e3nn, jaxtyping, numpy, scipy, pytest"

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} .venv-gpu/bin/python python3.12 python3 .venv/bin/python; do
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
  echo "gpu_check: installing what atomeq needs into .venv-gpu, beside the torch of $python"
  "$python" -m venv --system-site-packages .venv-gpu
  python=.venv-gpu/bin/python
  wheels=()
  if [ -d gpu_wheels ]; then wheels=(--no-index --find-links gpu_wheels --no-deps); fi
  # torch stays the system's: a constraint keeps pip from bringing another one
  "$python" -c "import torch; print('torch==' + torch.__version__)" >.venv-gpu/constraints
  timeout 90 "$python" -m pip install --quiet --disable-pip-version-check \
    "${wheels[@]}" --constraint .venv-gpu/constraints \
    ase e3nn jaxtyping wadler-lindig opt_einsum opt_einsum_fx scipy \
    pytest pluggy iniconfig packaging pygments ||
    echo "gpu_check: pip found not all of it; going on with what is there"
  "$python" -c "$needed"
fi
"$python" -c "import torch, sys; print('gpu_check:', sys.version.split()[0], 'torch', \
torch.__version__, torch.cuda.get_device_name(), file=sys.stderr)"

# Each step has its own limit, so that a slow one leaves the results of the others.
failed=()
step() {
  local name=$1 limit=$2
  shift 2
  echo "gpu_check: $name (at most $limit s)"
  local code=0
  timeout --kill-after=5 "$limit" "$@" >"$out/gpu_$name.log" 2>&1 || code=$?
  tail -n 40 "$out/gpu_$name.log"
  if [ "$code" -ne 0 ]; then
    failed+=("$name: exit code $code$([ "$code" -eq 124 ] && echo ', out of time' || true)")
  fi
}
# These files import the operations alone: others need packages that a GPU machine may lack.
step tests 200 "$python" -m pytest tests/ops/test_triton.py tests/ops/test_triton_gradients.py \
  tests/ops/test_adapters.py -m "(gpu or triton) and not slow" -q -p no:cacheprovider \
  --junitxml "$out/gpu_tests.xml"
step benchmark 230 "$python" scripts/benchmark.py tensor-product --device cuda --quick \
  --out "$out/tensor_product_cuda.json"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu_check: FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "gpu_check: passed; results are in $out"
