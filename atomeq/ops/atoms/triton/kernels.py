"""Normalisation and update of atoms: norm and gate read every number once or twice."""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.specification import OpSpec
from atomeq.ops.triton_launch import accumulator, ceil_div, launch, power_of_2
from atomeq.ops.triton_launch import refusal as launch_refusal

_WIDEST = 128  # channels of one program of the gate


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return launch_refusal(spec, any_channels=True)


def atom_norm(call: SimpleNamespace) -> Tensor:
    """Return the normalised features, (n_atoms, n_sph, channels)."""
    return _launch_norm(call, call.bias, None, call.bias is not None)


def atom_norm_gradient(call: SimpleNamespace) -> Tensor:
    """Return the gradient of the norm by its features."""
    return _launch_norm(call, None, call.grad, call.centred)


def _launch_norm(
    call: SimpleNamespace, bias: Tensor | None, grad: Tensor | None, centred: bool
) -> Tensor:
    x, result = call.x, torch.empty_like(call.x)
    launch(
        *(_norm, (len(x),), x, call.weight, bias, grad, result),
        like=x,
        epsilon=call.epsilon,
        CENTRED=centred,
        LMAX=len(call.weight) - 1,
        CHANNELS=x.shape[2],
        BLOCK=power_of_2(x.shape[2]),
        SUM=accumulator(x.dtype),
    )
    return result


def atom_update(call: SimpleNamespace) -> Tensor:
    """Return the update, (n_atoms, n_sph, c_out): products of matrices around the gate.

    Inside, features lie degree by degree, (n_sph, n_atoms, channels): a degree is then one matrix,
    and its map one product, where (n_atoms, n_sph, channels) would need a small one for each atom.
    """
    rows = gate(*_before_gate(call, _by_degrees(call.x)))
    return _by_degrees(_mapped(rows, call.second.mT, call.second_bias))


def atom_update_gradient(call: SimpleNamespace) -> Tensor:
    """Return the gradient of the update by its features; the gate's own are computed again."""
    before = _before_gate(call, _by_degrees(call.x))
    to_rows, to_gates = gate_gradient(*before, _mapped(_by_degrees(call.grad), call.second))
    to_x = _mapped(to_rows, call.first)
    to_x[0].addmm_(to_gates, call.gates)
    return _by_degrees(to_x)


def _before_gate(call: SimpleNamespace, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the gate is given: rows (n_sph, n_atoms, hidden), and gates."""
    gates = torch.nn.functional.linear(x[0], call.gates, call.gates_bias)
    return _mapped(x, call.first.mT, call.first_bias), gates


def _by_degrees(x: Tensor) -> Tensor:
    """Exchange atoms and coefficients; the way back is the same."""
    return x.transpose(0, 1).contiguous()


def _mapped(rows: Tensor, matrices: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the rows of each degree times its matrix, with a bias on l = 0."""
    found = rows.new_empty(*rows.shape[:2], matrices.shape[2])
    for l, matrix in enumerate(matrices.unbind(0)):
        part = slice(l * l, (l + 1) ** 2)
        torch.mm(rows[part].flatten(0, 1), matrix, out=found[part].flatten(0, 1))
    if bias is not None:
        found[0] += bias
    return found


def gate(x: Tensor, gates: Tensor) -> Tensor:
    """Apply SiLU to l = 0 and sigmoid gates to l > 0 of (n_sph, n_atoms, channels), in place."""
    _launch_gate(_gate, x, gates)
    return x


def gate_gradient(x: Tensor, gates: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by the gates, in place of ``grad`` and of the gates."""
    _launch_gate(_gate_gradient, x, gates, grad)
    return grad, gates


def _launch_gate(kernel: object, x: Tensor, *others: Tensor) -> None:
    n_atoms, channels = x.shape[1:]
    block = min(_WIDEST, power_of_2(channels))
    launch(
        *(kernel, (n_atoms, ceil_div(channels, block)), x, *others),
        like=x,
        n_atoms=n_atoms,
        LMAX=others[0].shape[1] // channels,
        CHANNELS=channels,
        BLOCK=block,
        SUM=accumulator(x.dtype),
    )


@triton.jit
def _norm(x, weight, bias, grad, result, epsilon, CENTRED: tl.constexpr, LMAX: tl.constexpr,
          CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Write the norm of an atom, or with ``grad`` its gradient: s h - s^3 <h, v> v / N, h = w g."""
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    start = tl.program_id(0).to(tl.int64) * ((LMAX + 1) * (LMAX + 1) * CHANNELS)
    shift = tl.zeros((BLOCK,), dtype=SUM)
    if CENTRED:
        first = tl.load(x + start + channel, mask=inside, other=0.0).to(SUM)
        shift += tl.where(inside, tl.sum(first, axis=0) / CHANNELS, 0.0)
    squares, products = tl.zeros((BLOCK,), dtype=SUM), tl.zeros((BLOCK,), dtype=SUM)
    for l in tl.static_range(LMAX + 1):
        factor = tl.load(weight + l * CHANNELS + channel, mask=inside, other=0.0).to(SUM)
        for row in range(l * l, (l + 1) * (l + 1)):
            at = start + row * CHANNELS + channel
            value = tl.load(x + at, mask=inside, other=0.0).to(SUM) - shift * (l == 0)
            squares += value * value / (2 * l + 1)
            if grad is not None:
                products += tl.load(grad + at, mask=inside, other=0.0).to(SUM) * factor * value
    mean = tl.sum(squares, axis=0) / ((LMAX + 1) * CHANNELS)
    scale = 1.0 / tl.sqrt(mean + epsilon)
    back = scale * scale * scale * tl.sum(products, axis=0) / ((LMAX + 1) * CHANNELS)
    for l in tl.static_range(LMAX + 1):
        factor = tl.load(weight + l * CHANNELS + channel, mask=inside, other=0.0).to(SUM)
        for row in range(l * l, (l + 1) * (l + 1)):
            at = start + row * CHANNELS + channel
            value = tl.load(x + at, mask=inside, other=0.0).to(SUM) - shift * (l == 0)
            if grad is None:
                out = value * scale * factor
                if bias is not None:
                    out += tl.load(bias + channel, mask=inside, other=0.0).to(SUM) * (l == 0)
            else:
                pull = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
                out = pull * factor * scale - back / (2 * l + 1) * value
                level = tl.sum(tl.where(inside, out, 0.0), axis=0) / CHANNELS
                out -= level * (CENTRED and l == 0)
            tl.store(result + at, out, mask=inside)


@triton.jit
def _gate(x, gates, n_atoms, LMAX: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
          SUM: tl.constexpr):  # fmt: skip
    atom = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    at = atom * CHANNELS + channel
    value = tl.load(x + at, mask=inside, other=0.0).to(SUM)
    tl.store(x + at, value / (1.0 + tl.exp(-value)), mask=inside)
    for l in tl.static_range(1, LMAX + 1):
        own = gates + (atom * LMAX + l - 1) * CHANNELS + channel
        opened = 1.0 / (1.0 + tl.exp(-tl.load(own, mask=inside, other=0.0).to(SUM)))
        for row in range(l * l, (l + 1) * (l + 1)):
            place = x + row * n_atoms * CHANNELS + at
            tl.store(place, tl.load(place, mask=inside, other=0.0).to(SUM) * opened, mask=inside)


@triton.jit
def _gate_gradient(x, gates, grad, n_atoms, LMAX: tl.constexpr, CHANNELS: tl.constexpr,
                   BLOCK: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    atom = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    at = atom * CHANNELS + channel
    value = tl.load(x + at, mask=inside, other=0.0).to(SUM)
    pull = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
    steepness = 1.0 / (1.0 + tl.exp(-value))
    tl.store(grad + at, pull * steepness * (1.0 + value * (1.0 - steepness)), mask=inside)
    for l in tl.static_range(1, LMAX + 1):
        own = gates + (atom * LMAX + l - 1) * CHANNELS + channel
        opened = 1.0 / (1.0 + tl.exp(-tl.load(own, mask=inside, other=0.0).to(SUM)))
        total = tl.zeros((BLOCK,), dtype=SUM)
        for row in range(l * l, (l + 1) * (l + 1)):
            place = row * n_atoms * CHANNELS + at
            pull = tl.load(grad + place, mask=inside, other=0.0).to(SUM)
            total += pull * tl.load(x + place, mask=inside, other=0.0).to(SUM)
            tl.store(grad + place, pull * opened, mask=inside)
        tl.store(own, total * opened * (1.0 - opened), mask=inside)
