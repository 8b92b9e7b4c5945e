"""What a propagator is shown of particles: charges, masses or the atoms of one molecule.

Training and use go through the same :class:`ParticleView`, and a saved propagator keeps it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from ase.data import chemical_symbols
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.arguments import refuse_wrong_types
from atomeq.typing import EdgeIndex

Kind = Literal["charged", "gravity", "molecule"]
SystemVectors: TypeAlias = Float[Tensor, "n_systems n_particles 3"]
SystemNumbers: TypeAlias = Float[
    Tensor, "n_systems n_particles"
]  # charges, masses or atomic numbers
Pairs: TypeAlias = Int[
    Tensor, "2 n_pairs"
]  # within one system; row 0 is j, row 1 is i and receives

#: Numbers that each kind gives with a particle, and with a pair.
N_INPUTS: dict[Kind, int] = {"charged": 1, "gravity": 1, "molecule": 2}
N_EDGE_FEATURES: dict[Kind, int] = {"charged": 2, "gravity": 1, "molecule": 5}


@dataclass(frozen=True)
class ParticleView:
    """What a propagator is shown, as published with EGNN, SEGNN and SEGNO.

    All kinds give the speed of a particle and the squared distance of a pair. Charges add the
    product of both; equal masses add nothing. Atoms add Z over the largest Z of the molecule, and
    of a pair both Z, one, zero (there are no rigid sticks); the pairs are those that were within a
    bond length at the start of the training trajectory, and stay.

    Velocities are multiplied by ``time``, so that a network's own unit of time is one long step.

    Attributes:
        kind: ``charged`` or ``gravity``: all pairs; ``molecule``: given pairs of given atoms.
        time: Duration of a long step, fs for a molecule.
        atomic_numbers: Of the molecule, in the order of its atoms.
        bonds: Pairs of its atoms that see each other, the smaller index first.
    """

    kind: Kind = "charged"
    time: float = 1.0
    atomic_numbers: tuple[int, ...] = ()
    bonds: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be used."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r} is unknown; there are {', '.join(N_INPUTS)}")
        if not self.time > 0:
            raise ValueError(f"a long step takes time {self.time}; it must be > 0")
        molecule = self.kind == "molecule"
        if molecule != bool(self.atomic_numbers) or molecule != bool(self.bonds):
            raise ValueError(f"atomic_numbers and bonds belong to molecules; this is {self.kind}")
        n_atoms = len(self.atomic_numbers)
        if any(not 0 <= first < second < n_atoms for first, second in self.bonds):
            raise ValueError(f"bonds are pairs i < j of the {n_atoms} atoms of the molecule")

    def config(self) -> dict[str, Any]:
        """Return plain values that build this view again."""
        values = asdict(self)
        values["atomic_numbers"] = list(self.atomic_numbers)
        values["bonds"] = [list(bond) for bond in self.bonds]
        return values

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "ParticleView":
        """Build a view from what :meth:`config` returned.

        Raises:
            ValueError: An unknown key, or values that cannot be used.
        """
        try:
            refuse_wrong_types(cls.__init__, values)
            bonds = tuple((int(i), int(j)) for i, j in values.get("bonds", ()))
            numbers = tuple(int(number) for number in values.get("atomic_numbers", ()))
            return cls(**{**values, "bonds": bonds, "atomic_numbers": numbers})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"this is no view of particles: {error}") from error

    def pairs(self, n_particles: int) -> Pairs:
        """Return the pairs within one system, in both directions, sorted by target."""
        if self.kind == "molecule":
            first, second = torch.tensor(self.bonds).T
            target, source = torch.cat([first, second]), torch.cat([second, first])
            order = torch.argsort(target, stable=True)
            return torch.stack([source[order], target[order]])
        return fully_connected(1, n_particles)

    def features(
        self, pos: SystemVectors, velocities: SystemVectors, numbers: SystemNumbers, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        """Return what a network is given with particles and pairs.

        Args:
            pos: Positions, (n_systems, n_particles, 3).
            velocities: In units of length over ``time``, of the same shape.
            numbers: Charges, masses or atomic numbers, (n_systems, n_particles).
            pairs: As :meth:`pairs` returns them.

        Returns:
            Features of particles, (n_systems, n_particles, n_inputs), and of pairs,
            (n_systems, n_pairs, n_edge_features).
        """
        source, target = pairs
        speed = torch.linalg.vector_norm(velocities, dim=-1, keepdim=True)
        squared = ((pos[:, target] - pos[:, source]) ** 2).sum(dim=-1)
        if self.kind == "charged":
            products = numbers[:, target] * numbers[:, source]
            return speed, torch.stack([products, squared], dim=-1)
        if self.kind == "gravity":
            return speed, squared[..., None]
        largest = max(self.atomic_numbers)
        of_atoms = torch.cat([speed, numbers[..., None] / largest], dim=-1)
        one, zero = torch.ones_like(squared), torch.zeros_like(squared)
        of_pairs = [numbers[:, target], numbers[:, source], one, zero, squared]
        return of_atoms, torch.stack(of_pairs, dim=-1)

    def refuse_others(self, numbers: Tensor) -> None:
        """Refuse particles this view was not made for.

        Args:
            numbers: Charges, masses or atomic numbers, (n_systems, n_particles).

        Raises:
            ValueError: Another molecule, charges other than ±1, masses other than 1.
        """
        if self.kind == "molecule":
            known = torch.tensor(self.atomic_numbers, dtype=numbers.dtype)
            if numbers.shape[1:] != known.shape or not (numbers.cpu() == known).all():
                raise ValueError(
                    f"this propagator was trained on {formula(self.atomic_numbers)}, with its "
                    "atoms in that order; it knows no other molecule"
                )
        elif self.kind == "gravity" and not (numbers == 1).all():
            raise ValueError("this propagator was trained on masses of 1 and does not see others")
        elif self.kind == "charged" and not (numbers.abs() == 1).all():
            raise ValueError("this propagator was trained on charges of -1 and 1 only")


def formula(atomic_numbers: Sequence[int]) -> str:
    """Return the symbols of atoms in their order, runs counted: C2H6O."""
    words: list[tuple[str, int]] = []
    for number in atomic_numbers:
        symbol = chemical_symbols[number]
        if words and words[-1][0] == symbol:
            words[-1] = (symbol, words[-1][1] + 1)
        else:
            words.append((symbol, 1))
    return "".join(symbol + (str(count) if count > 1 else "") for symbol, count in words)


def batched_pairs(pairs: Pairs, n_systems: int, n_particles: int) -> EdgeIndex:
    """Return the edges of many systems, one after the other, each with the same pairs."""
    first = torch.arange(n_systems, device=pairs.device) * n_particles
    return (pairs[:, None, :] + first[None, :, None]).flatten(1)


def fully_connected(n_systems: int, n_bodies: int) -> EdgeIndex:
    """Return all ordered pairs of different bodies within each system, sorted by target."""
    target, source = torch.nonzero(~torch.eye(n_bodies, dtype=torch.bool), as_tuple=True)
    first = torch.arange(n_systems).repeat_interleave(len(target)) * n_bodies
    return torch.stack([source.repeat(n_systems) + first, target.repeat(n_systems) + first])
