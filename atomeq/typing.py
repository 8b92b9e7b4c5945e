"""Named tensor types: a name here is a shape and a unit, used in every public signature.

The shape strings are jaxtyping's; they are checked at run time in the tests only
(``pytest --jaxtyping-packages=atomeq,beartype.beartype``). Units are eV, Å, fs, amu, e and K
everywhere inside the package; other units exist only at the doors (see :mod:`atomeq.units`).
"""

from typing import Literal, TypeAlias, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

# Structure
Positions: TypeAlias = Float[Tensor, "n_atoms 3"]  # Å
AtomicNumbers: TypeAlias = Int[Tensor, " n_atoms"]
Cells: TypeAlias = Float[Tensor, "n_graphs 3 3"]  # Å; rows are lattice vectors
Periodicity: TypeAlias = Bool[Tensor, "n_graphs 3"]
BatchIndex: TypeAlias = Int[Tensor, " n_atoms"]  # the graph each atom belongs to
GraphCounts: TypeAlias = Int[Tensor, " n_graphs"]  # atoms, or anything, of each structure
Strain: TypeAlias = Float[Tensor, "n_graphs 3 3"]  # only its symmetric part acts
Volumes: TypeAlias = Float[Tensor, " n_graphs"]  # Å³

# Graph
EdgeIndex: TypeAlias = Int[Tensor, "2 n_edges"]  # row 0 = j, source; row 1 = i, target
CellOffsets: TypeAlias = Int[Tensor, "n_edges 3"]  # image of j, in lattice vectors
EdgeVectors: TypeAlias = Float[Tensor, "n_edges 3"]  # Å; r_j - r_i
EdgeLengths: TypeAlias = Float[Tensor, " n_edges"]  # Å

# Features; n_sph = (lmax + 1)**2, coefficient (l, m) sits in row l*l + l + m
NodeFeatures: TypeAlias = Float[Tensor, "n_atoms n_sph channels"]
EdgeFeatures: TypeAlias = Float[Tensor, "n_edges n_sph channels"]

# What a potential returns
Energies: TypeAlias = Float[Tensor, " n_graphs"]  # eV, per structure
AtomicEnergies: TypeAlias = Float[Tensor, " n_atoms"]  # eV, per atom
Forces: TypeAlias = Float[Tensor, "n_atoms 3"]  # eV/Å
Stress: TypeAlias = Float[Tensor, "n_graphs 3 3"]  # eV/Å³, ASE's sign: positive when stretched

Scalars: TypeAlias = Float[Tensor, " n_graphs"]  # a property that is no energy, in its own unit

# What a structure does in an electric field; of atoms, d dipole / d position
Dipoles: TypeAlias = Float[Tensor, "n_graphs 3"]  # e·Å
Quadrupoles: TypeAlias = Float[Tensor, "n_graphs 3 3"]  # e·Å², without trace
Polarizabilities: TypeAlias = Float[Tensor, "n_graphs 3 3"]  # e²·Å²/eV
BornCharges: TypeAlias = Float[Tensor, "n_atoms 3 3"]  # e; [atom, of the dipole, of the position]

# How coarse the operands of matrix products may be: fp32, TF32, bfloat16; see ops/precision.py
Precision: TypeAlias = Literal["highest", "high", "medium"]

ElectricProperty: TypeAlias = Literal["dipole", "quadrupole", "polarizability"]
#: What an AtomGraph holds for a structure, and not for each of its atoms.
OF_STRUCTURES = frozenset(
    {"energy", "stress", "scalar", "energy_uncertainty", *get_args(ElectricProperty)}
)

PropertyKey: TypeAlias = Literal[
    "energy",
    "energies",
    "forces",
    "gradient_forces",
    "orientation",
    "stress",
    "scalar",
    "dipole",
    "quadrupole",
    "polarizability",
    "born_effective_charges",
    "features",
    "sphere_features",
    "energy_uncertainty",
    "forces_uncertainty",
    "extrapolation",
]
