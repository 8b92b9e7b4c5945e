"""A GPU that is not there, for torch's compiler: a potential becomes kernels for sm_90 on a CPU.

Tensors are fake, so shapes and devices are known and nothing is computed; what the compiler would
try on the GPU to find the fastest, it compiles in its first form. That takes the place of torch's
own functions in the whole process, so this is a script; it prints JSON. It knows torch 2.13.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.graph
import triton
from small_models import SMALL_MODELS
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._inductor import config
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import cpp_extension
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget

from atomeq.potential import export
from atomeq.potential.checkpoint import build_model
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"  # what Triton brings of the toolkit
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2_048,
    max_threads_per_block=1_024, shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448, total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20, gcnArchName="", clock_rate=1_980_000,
)  # fmt: skip
#: Left out is what would run on the GPU to decide something, and the C++ compiler.
OPTIONS = {
    "compile_threads": 1,
    "shape_padding": False,
    "joint_graph_constant_folding": False,
    "triton.autotune_at_compile_time": True,
    "aot_inductor.package_cpp_only": True,
    "aot_inductor.precompile_headers": False,
}
_tune = PythonWrapperCodegen.generate_and_run_autotune_block


class Weights:
    """The values of a program's weights, which the program has no longer."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        """Make the weights and the example of a program fake, in place."""
        values = [node.meta.get("val") for node in program.graph.nodes]
        self._mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        self._by_name = dict(program.state_dict | program.constants)
        for table in (program.state_dict, program.constants):
            for name, value in table.items():
                fake = self._fake(value)
                is_weight = isinstance(value, nn.Parameter)
                table[name] = nn.Parameter(fake, requires_grad=False) if is_weight else fake
        program._example_inputs = tree_map_only(Tensor, self._fake, program.example_inputs)

    def _fake(self, value: Tensor) -> Tensor:
        return self._mode.from_tensor(value.detach(), static_shapes=True)

    def find(self, graph: GraphLowering, name: str) -> Tensor:
        """Return the values of a constant of the compiler's."""
        return self._by_name[graph.allocated_constant_name.get(name, name)].detach()

    def numbers(self, program: torch.export.ExportedProgram) -> None:
        """Let the few numbers that the compiler writes into its code be read."""
        known = {
            id(fake): self._by_name[name]
            for name, fake in (program.state_dict | program.constants).items()
        }
        for method in ("tolist", "item"):
            read = getattr(Tensor, method)
            setattr(FakeTensor, method, lambda fake, read=read: read(known[id(fake)]))


class Nothing(contextlib.AbstractContextManager):
    """Takes the place of what makes a device the current one."""

    def __init__(self, *_: Any) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def compile_first(tuner: Any, *_: Any, stream: int = 0, **__: Any) -> None:
    """Compile a kernel in its first form and keep it, where the fastest would be looked for."""
    made = tuner._precompile_config(tuner.configs[0])
    names, constants = tuner.fn.arg_names, tuner.fn.constexprs
    _, given, none = made._get_arg_lists(names, constants)
    launcher = SimpleNamespace(
        bin=made.kernel,
        config=tuner.configs[0],
        def_args=given,
        call_args=[n for i, n in enumerate(names) if i not in constants and n not in none],
        global_scratch=None,
        profile_scratch=None,
    )
    tuner.save_gpu_kernel(stream, launcher)


def tune_nothing(wrapper: PythonWrapperCodegen) -> None:
    """Go through all kernels with tensors that are as fake as the others."""
    with _disable_current_modes(), FakeTensorMode():
        _tune(wrapper)


def pretended(weights: Weights) -> contextlib.ExitStack:
    """Let torch's compiler believe in a GPU as long as the context lasts."""
    interface = device_interface.CudaInterface
    device_interface.caching_worker_device_properties["cuda"] = [H100]
    device_interface.caching_worker_current_devices["cuda"] = 0
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    replaced: list[tuple[Any, str, Any]] = [
        (interface, "is_available", staticmethod(lambda: True)),
        (interface, "device_count", staticmethod(lambda: 1)),
        (interface, "current_device", staticmethod(lambda: 0)),
        (interface, "get_device_properties", staticmethod(lambda *_: H100)),
        (interface, "get_raw_stream", staticmethod(lambda _: 0)),
        (interface, "synchronize", staticmethod(lambda *_: None)),
        (interface, "device", Nothing),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda *_: H100),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "_DeviceGuard", Nothing),
        (torch.cuda, "set_device", lambda _: None),
        (torch.version, "cuda", "13.0"),
        (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
        (cpp_extension, "CUDA_HOME", str(NVIDIA)),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (triton_heuristics.CachingAutotuner, "run", compile_first),
        (triton_heuristics.CachingAutotuner, "precompile", lambda *_, **__: None),
        (PythonWrapperCodegen, "generate_and_run_autotune_block", tune_nothing),
        (torch._inductor.graph, "is_same_tensor", lambda one, other: one is other),
        (GraphLowering, "get_original_value_of_constant", lambda g, n: weights.find(g, n)),
    ]
    stack = contextlib.ExitStack()
    for owner, name, value in replaced:
        stack.enter_context(mock.patch.object(owner, name, value, create=True))
    stack.enter_context(config.patch(OPTIONS))
    return stack


def register_guard(folder: Path) -> None:
    """Give the name of CUDA's devices to torch, which a build for the CPU does not know at all."""
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    paths = [f"-I{path}" for path in cpp_extension.include_paths()]
    paths += [f"-L{path}" for path in cpp_extension.library_paths()]
    words = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), *paths, "-lc10"]
    subprocess.run([*words, "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


def on_host(program: torch.export.ExportedProgram) -> list[str]:
    """Return what of a program is on the CPU: weights, constants, results, devices by name."""
    found = [
        name for name, value in (program.state_dict | program.constants).items() if value.is_cpu
    ]
    for node in program.graph.nodes:
        values = [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
        devices = [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, torch.device)]
        if any(x.device.type != "cuda" for x in values) or torch.device("cpu") in devices:
            found.append(node.name)
    return found


def compiled(name: str, path: Path) -> dict[str, Any]:
    """Compile a small potential for sm_90; return what came of it."""
    model = build_model(SMALL_MODELS[name])
    potential = Potential(model, AtomicReferences({13: -1.0, 29: -2.0})).requires_grad_(False)
    program = export._exported(potential.eval())
    weights = Weights(program)
    with pretended(weights):
        program = export._on(torch.device("cuda"), program)
        weights.numbers(program)
        export._compile(program, path, {})
    with zipfile.ZipFile(path) as archive:
        kernels = [archive.read(name) for name in archive.namelist() if name.endswith(".cubin")]
    return {
        "operations": len(program.graph.nodes),
        "on_host": on_host(program),
        "kernels": len(kernels),
        "for_sm_90": sum(b"sm_90" in kernel for kernel in kernels),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        register_guard(Path(work))
        found = {name: compiled(name, Path(work) / f"{name}.pt2") for name in sys.argv[1:]}
    json.dump(found, sys.stdout)
