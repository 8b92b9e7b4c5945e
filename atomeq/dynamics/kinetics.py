"""Velocities: energies, temperatures, degrees of freedom, and noise that belongs to one structure.

Velocities are Å/fs, masses amu, energies eV.
"""

import torch
from torch import Tensor

from atomeq.dynamics.state import per_system
from atomeq.graph.atom_graph import AtomGraph
from atomeq.typing import Energies, Forces, Positions
from atomeq.units import ACCELERATION, BOLTZMANN

_MASK = (1 << 64) - 1


def kinetic_energy(graph: AtomGraph) -> Energies:
    """Return the kinetic energy of each structure, (n_graphs,), eV."""
    squared = graph["velocities"].square().sum(dim=1)
    return per_system(graph["masses"] * squared, graph) / (2 * ACCELERATION)


def kinetic_tensor(graph: AtomGraph) -> Tensor:
    """Return Σ m v vᵀ of each structure, (n_graphs, 3, 3), eV; its trace is twice the energy."""
    velocities = graph["velocities"]
    outer = graph["masses"][:, None, None] * velocities[:, :, None] * velocities[:, None, :]
    return per_system(outer, graph) / ACCELERATION


def temperature(graph: AtomGraph, degrees: Tensor) -> Tensor:
    """Return the temperature of each structure, (n_graphs,), K.

    Args:
        graph: With velocities.
        degrees: Degrees of freedom, (n_graphs,), as :func:`degrees_of_freedom` counts them.
    """
    return 2 * kinetic_energy(graph) / (BOLTZMANN * degrees.clamp(min=1))


def degrees_of_freedom(graph: AtomGraph, *, held: bool) -> Tensor:
    """Count what can move in each structure, (n_graphs,): three for each atom that is not fixed.

    Args:
        graph: The structures.
        held: Whether the centre of mass is held; in structures with fixed atoms nothing holds it.
    """
    degrees = 3 * per_system((~graph["fixed"]).to(torch.int64), graph)
    return degrees - 3 * is_free(graph).to(torch.int64) if held else degrees


def is_free(graph: AtomGraph) -> Tensor:
    """Tell which structures have no fixed atom, (n_graphs,)."""
    return per_system(graph["fixed"].to(torch.int64), graph) == 0


def acceleration(graph: AtomGraph) -> Forces:
    """Return forces over masses, (n_atoms, 3), Å/fs²; zero for fixed atoms."""
    return graph.forces * (ACCELERATION / graph["masses"][:, None])


def without_drift(velocities: Positions, graph: AtomGraph) -> Positions:
    """Stop the centre of mass of every structure that has no fixed atom."""
    masses = graph["masses"]
    momentum = per_system(masses[:, None] * velocities, graph)
    drift = momentum / per_system(masses, graph)[:, None]
    return velocities - torch.where(is_free(graph)[:, None], drift, 0.0)[graph.batch]


def thermal_velocities(
    graph: AtomGraph, temperature: float, seeds: Tensor, *, held: bool = True
) -> Positions:
    """Draw velocities from the Maxwell-Boltzmann distribution, (n_atoms, 3), Å/fs.

    Args:
        graph: The structures; fixed atoms stay at rest.
        temperature: K.
        seeds: Of each structure, (n_graphs,).
        held: Whether the centre of mass stays at rest.
    """
    noise = standard_normal(seeds, torch.full_like(seeds, -1), graph.natoms, (3,))
    width = (BOLTZMANN * temperature * ACCELERATION / graph["masses"]).sqrt()
    velocities = torch.where(graph["fixed"][:, None], 0.0, width[:, None] * noise)
    return without_drift(velocities, graph) if held else velocities


def standard_normal(
    seeds: Tensor, counters: Tensor, counts: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Draw normal numbers that depend on a structure's seed and counter and on nothing else.

    They are drawn on the CPU, so that every device integrates the same noise, from a generator
    that is seeded anew for each structure and counter: the seed and the number of steps are all
    there is to save for a restart.

    Args:
        seeds: (n_graphs,) int64.
        counters: Which draw of the structure it is, (n_graphs,) int64.
        counts: How many rows each structure gets, (n_graphs,) int64.
        shape: Of a row.

    Returns:
        (sum of counts, *shape), float64, on the device of the seeds.
    """
    generator = torch.Generator()
    draws = torch.stack([seeds, counters, counts], dim=1).tolist()  # a device is asked but once
    rows = torch.empty(sum(count for *_, count in draws), *shape, dtype=torch.float64)
    start = 0
    for seed, counter, count in draws:
        generator.manual_seed(mix(seed, counter))
        rows[start : start + count] = torch.randn(
            count, *shape, generator=generator, dtype=torch.float64
        )
        start += count
    return rows.to(seeds.device)


def mix(seed: int, counter: int) -> int:
    """Return 63 bits that look unrelated for neighbouring seeds and counters."""
    z = (seed * 0x9E3779B97F4A7C15 + counter * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's end
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return (z ^ (z >> 31)) >> 1
