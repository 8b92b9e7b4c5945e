"""Atomic references: the shift per element and the scale between a network's output and eV."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from atomeq.typing import AtomicEnergies, AtomicNumbers, PropertyKey

MAX_ATOMIC_NUMBER = 118

_REWEIGHTINGS, _AGREED = 30, 1e-4  # of robust fits; eV/atom that count as no error


class AtomicReferences(nn.Module):
    """E = Σ_i (scale · e_i + shift[Z_i]) + offset, in float64 whatever the network's dtype.

    Total energies of DFT reach 10⁵ eV while forces come from 10⁻³ eV of them: a float32 sum would
    lose what matters, so these numbers stay float64 under ``.to(dtype)``.

    Args:
        shift: Energy of each known element, eV, by atomic number. Elements not named are unknown to
            the potential, which refuses structures that hold them. None: all known, no shift.
        scale: eV per unit of the network's output, of all elements or (119,) of each by atomic
            number; forces and stress scale with it.
        offset: Energy of every structure whatever its size, eV: the mean that published models of
            OC20 were normalised by. Not extensive, so zero for any other model.
        force_scale: eV/Å per unit of the network's forces; by default the scale.
        stress_scale: eV/Å³ per unit of the network's stress, of its trace and of the rest; by
            default the scale.
        stress_offset: Added to the stress, (3, 3), eV/Å³: the mean that a published stress head was
            normalised by.
    """

    shift: Tensor
    scale: Tensor
    offset: Tensor
    force_scale: Tensor
    stress_scale: Tensor
    stress_offset: Tensor
    known: Tensor

    def __init__(
        self,
        shift: Mapping[int, float] | None = None,
        *,
        scale: float | Tensor = 1.0,
        offset: float = 0.0,
        force_scale: float | None = None,
        stress_scale: tuple[float, float] | None = None,
        stress_offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        table = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
        known = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.bool)
        if shift is None:
            known[1:] = True
        for number, energy in (shift or {}).items():
            table[number] = energy
            known[number] = True
        self.register_buffer("shift", table)
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64).clone())
        scale = float(self.scale.mean())  # of heads, which are not told of elements
        force_scale = scale if force_scale is None else force_scale
        self.register_buffer("offset", torch.tensor(float(offset), dtype=torch.float64))
        self.register_buffer("force_scale", torch.tensor(float(force_scale), dtype=torch.float64))
        trace_and_rest = (scale, scale) if stress_scale is None else stress_scale
        self.register_buffer("stress_scale", torch.tensor(trace_and_rest, dtype=torch.float64))
        zeros = torch.zeros(3, 3, dtype=torch.float64)
        self.register_buffer("stress_offset", zeros if stress_offset is None else stress_offset)
        self.register_buffer("known", known)
        self.register_load_state_dict_pre_hook(_complete)

    def train_elements(self, *names: str) -> None:
        """Make the shift or the scale of each element a parameter, which an optimizer may train.

        Args:
            names: ``shift``, ``scale``.

        Raises:
            ValueError: Forces or stress have a scale of their own, which would stay.
        """
        if "scale" in names and self.rescales_derivatives:
            raise ValueError("a scale of forces or stress apart from the energy's is not trained")
        for name in names:
            table = getattr(self, name).detach().expand_as(self.shift).clone()
            delattr(self, name)
            setattr(self, name, nn.Parameter(table))

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers the references know."""
        return tuple(torch.nonzero(self.known).flatten().tolist())

    def forward(self, energies: AtomicEnergies, atomic_numbers: AtomicNumbers) -> AtomicEnergies:
        """Turn network outputs (n_atoms,) into atomic energies (n_atoms,), eV, without offset."""
        scale = self.scale[atomic_numbers] if self.scale.ndim else self.scale
        return scale * energies.to(torch.float64) + self.shift[atomic_numbers]

    def of_heads(self, forces: Tensor | None, stress: Tensor | None) -> dict[PropertyKey, Tensor]:
        """Turn what a network has heads for into forces, eV/Å, and stress, eV/Å³.

        Args:
            forces: Of the network, (n_atoms, 3).
            stress: Of the network, (n_graphs, 3, 3).

        Returns:
            Those that are given, by name.
        """
        found: dict[PropertyKey, Tensor] = {}
        if forces is not None:
            found["forces"] = forces * self.force_scale.to(forces.dtype)
        if stress is not None:
            trace, rest = self.stress_scale.to(stress.dtype)
            mean = stress.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
            mean = mean * torch.eye(3, dtype=stress.dtype, device=stress.device)
            offset = self.stress_offset.to(stress.dtype)
            found["stress"] = trace * mean + rest * (stress - mean) + offset
        return found

    def of_derivative(self, key: PropertyKey, derivative: Tensor) -> Tensor:
        """Bring a derivative of the energy to the scale of forces or of stress.

        Those are the energy's, so that nothing changes, but for published models whose files say
        something else of each.

        Args:
            key: ``forces`` or ``stress``.
            derivative: Of the energy, of any shape.

        Returns:
            The same shape.
        """
        if self.scale.ndim:
            return derivative
        if key == "forces":
            return derivative * (self.force_scale / self.scale)
        return derivative * (self.stress_scale[0] / self.scale) + self.stress_offset

    @property
    def rescales_derivatives(self) -> bool:
        """Whether :meth:`of_derivative` changes anything: forces then belong to no energy."""
        if self.scale.ndim:
            return False
        scales = torch.cat([self.force_scale[None], self.stress_scale])
        return bool((scales != self.scale).any() or (self.stress_offset != 0).any())

    def _apply(self, fn, recurse: bool = True):
        # Follow the module to its device, never to its dtype.
        device = fn(self.shift).device
        for name in self._buffers:
            setattr(self, name, getattr(self, name).to(device))
        for parameter in self._parameters.values():
            assert parameter is not None
            parameter.data = parameter.data.to(device)
        return self


def _complete(
    references: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Files from before offset and scales of their own existed mean their defaults.

    And a scale of all elements is that of each, where one of them has it.
    """
    scale = state_dict.get(f"{prefix}scale")
    if scale is not None:
        assert isinstance(references, AtomicReferences)
        if scale.shape == references.shift.shape and not references.scale.ndim:
            references.scale = references.scale.expand_as(references.shift).clone()
        elif not scale.ndim and references.scale.ndim:
            state_dict[f"{prefix}scale"] = scale.expand_as(references.scale)
        state_dict.setdefault(f"{prefix}offset", torch.zeros_like(scale))
        state_dict.setdefault(f"{prefix}force_scale", scale.clone())
        state_dict.setdefault(f"{prefix}stress_scale", scale.repeat(2))
        state_dict.setdefault(f"{prefix}stress_offset", scale.new_zeros(3, 3))


def least_squares_shift(
    compositions: Sequence[AtomicNumbers], energies: Sequence[float], *, robust: bool = False
) -> dict[int, float]:
    """Fit one energy per element to total energies, by least squares of minimum norm.

    Args:
        compositions: Atomic numbers of each structure, each (n_atoms,).
        energies: Total energy of each structure, eV.
        robust: Absolute errors per atom count, not squares of total ones (by reweighting): a few
            structures far off do not move what all others agree on.

    Returns:
        Shift by atomic number, eV. Where compositions leave a direction undetermined (one
        stoichiometry only), the solution of minimum norm shares the energy among its elements.

    Raises:
        ValueError: No structures, or not one energy for each.
    """
    if len(compositions) != len(energies) or not len(energies):
        raise ValueError(
            f"need one energy per structure and at least one structure; "
            f"got {len(compositions)} structures and {len(energies)} energies"
        )
    elements = sorted({int(z) for numbers in compositions for z in torch.unique(numbers)})
    counts = torch.stack(
        [torch.bincount(numbers.cpu(), minlength=MAX_ATOMIC_NUMBER + 1) for numbers in compositions]
    )[:, elements].to(torch.float64)
    targets = torch.tensor([float(e) for e in energies], dtype=torch.float64)
    weights = 1 / counts.sum(dim=1) if robust else torch.ones_like(targets)
    solution = torch.zeros(len(elements), dtype=torch.float64)
    for _ in range(_REWEIGHTINGS if robust else 1):
        rows, wanted = weights[:, None] * counts, weights * targets
        # gelsd finds the minimum-norm solution of rank-deficient systems; the default does not.
        solution = torch.linalg.lstsq(rows, wanted[:, None], driver="gelsd").solution[:, 0]
        missed = (counts @ solution - targets).abs() / counts.sum(dim=1)
        weights = missed.clamp(min=_AGREED).rsqrt() / counts.sum(dim=1)
    return dict(zip(elements, solution.tolist(), strict=True))
