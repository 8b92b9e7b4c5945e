"""The laws of a cell that moves: its conserved energy, its distribution and its pressure."""

from dataclasses import dataclass, replace

import pytest
import torch
from analytic_potentials import Gas, Pairs, crystal, of
from ase import Atoms

from atomeq.dynamics.barostat import LangevinNPT
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.state import prepare
from atomeq.units import BOLTZMANN, GPA

T = 300.0
KT = BOLTZMANN * T
LENGTH = 10.0  # Å, of the elastic cell at rest
STIFFNESS = 1.6  # eV; strains of a tenth


@dataclass(frozen=True)
class Frictionless(LangevinNPT):
    """The equations of motion alone, whose enthalpy is conserved."""

    friction_time: float = 1e15

    def _thermalized_rate(self, state, rate):
        return rate

    def conserved(self, state):
        squared = state.strain_rate.square().flatten(1).sum(dim=1)
        if self.barostat == "isotropic":  # one rate, written three times
            squared = squared / 3
        moving = self._mass(state.degrees).flatten() * squared / 2
        return state.total_energy() + self.pressure * state.graph.volume() + moving


class ElasticCell(Gas):
    """No forces between atoms, but a cell that resists: U = k/2 |h hᵀ / L² - 1|²."""

    def forward(self, graph):
        metric = torch.bmm(graph.cell, graph.cell.transpose(1, 2)) / LENGTH**2
        eye = torch.eye(3, dtype=metric.dtype)
        energy = STIFFNESS / 2 * (metric - eye).square().flatten(1).sum(dim=1)
        return {"energies": (energy / graph.natoms)[graph.batch] + self.zero * graph.pos[:, 0]}


@pytest.mark.parametrize("barostat", ["isotropic", "full"])
def test_enthalpy_strays_with_the_square_of_the_timestep(barostat):
    strays = []
    for timestep in (4.0, 2.0):
        motion = Frictionless(timestep, T, pressure=2 * GPA, barostat=barostat, barostat_time=400.0)
        evaluate = Evaluator(of(Pairs()))
        state = motion.init(prepare([crystal(seed=1), crystal(seed=2, a=3.7)]), evaluate)
        first, volumes = motion.conserved(state), state.graph.volume()
        stray = torch.zeros(2, dtype=torch.float64)
        for _ in range(int(160 / timestep)):
            state = motion.step(state, evaluate)
            stray = torch.maximum(stray, (motion.conserved(state) - first).abs())
        strays.append(stray)
        assert ((state.graph.volume() / volumes - 1).abs() > 0.01).all()  # the cell did move
    ratio = strays[0] / strays[1]
    assert ((ratio > 3.7) & (ratio < 4.3)).all(), (ratio, strays)
    assert (strays[1] < 5e-3).all(), strays


SYMMETRIC = torch.triu_indices(3, 3)


def flattened(state, barostat):
    """Return the variables of each structure of two atoms: r, v, h and ε, (n_graphs, n)."""
    rows = len(state.graph.cell)
    cell, rate = state.graph.cell.flatten(1), state.strain_rate[:, *SYMMETRIC]
    if barostat == "isotropic":
        cell, rate = cell[:, :1], rate[:, :1]
    pos, velocities = (state.graph[key].reshape(rows, 6) for key in ("pos", "velocities"))
    return torch.cat([pos, velocities, cell, rate], dim=1)


def unflattened(state, variables, barostat, evaluate):
    n_cell, eye = 1 if barostat == "isotropic" else 9, torch.eye(3, dtype=variables.dtype)
    pos, velocities, cell, rate = variables.split(
        [6, 6, n_cell, variables.shape[1] - 12 - n_cell], 1
    )
    if barostat == "isotropic":
        cell, rate = cell[:, :, None] * eye, rate[:, :, None] * eye
    else:
        full = torch.zeros(len(rate), 3, 3, dtype=rate.dtype)
        full[:, *SYMMETRIC] = rate
        full[:, SYMMETRIC[1], SYMMETRIC[0]] = rate
        cell, rate = cell.reshape(-1, 3, 3), full
    graph = state.graph.replace(
        pos=pos.reshape(-1, 3), velocities=velocities.reshape(-1, 3), cell=cell.contiguous()
    )
    return replace(state, graph=evaluate(graph, stress=True), strain_rate=rate)


@pytest.mark.parametrize("barostat", ["isotropic", "full"])
def test_a_step_preserves_the_measure_of_its_ensemble(barostat):
    """With U + PV and the kinetic energies conserved this makes p ~ V^N exp(-(U + PV)/kT).

    The measure is dr dv dh dε V^-2 of a full cell; of one that keeps its shape dr dv dL dε L²: the
    determinant of a step is the power of V that undoes it. All columns of the Jacobian, by central
    differences, are structures of one batch.
    """
    motion = Frictionless(2.0, T, pressure=2 * GPA, barostat=barostat, barostat_time=100.0)
    evaluate = Evaluator(of(Pairs(cutoff=4.0)))
    n = 14 if barostat == "isotropic" else 27
    atoms = Atoms("Cu2", cell=[5.0] * 3, pbc=True, positions=[[0.1, 0, 0.2], [2.0, 1.2, 0.9]])
    seeds = torch.zeros(2 * n, dtype=torch.int64)
    state = motion.init(prepare([atoms] * (2 * n)), evaluate, seeds=seeds)
    generator = torch.Generator().manual_seed(0)
    start = flattened(state, barostat)[:1]
    start = start + 1e-2 * torch.randn(start.shape, dtype=start.dtype, generator=generator)
    widths = torch.full((n,), 1e-4, dtype=start.dtype)
    widths[6:12] = widths[-6 if barostat == "full" else -1 :] = 1e-5  # velocities and rates
    shifts = torch.cat([torch.diag(widths), -torch.diag(widths)])
    moved = unflattened(state, start + shifts, barostat, evaluate)
    volume = moved.graph.volume().mean()
    after = motion.step(moved, evaluate)
    assert not after.failed.any()
    ends = flattened(after, barostat)
    jacobian = (ends[:n] - ends[n:]) / (2 * widths[:, None])
    grown = float(torch.log(after.graph.volume().mean() / volume))
    power = -2 / 3 if barostat == "isotropic" else 2
    assert abs(grown) > 1e-3
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(power * grown, abs=1e-6)


@pytest.mark.parametrize("barostat", ["isotropic", "full"])
def test_noise_and_friction_give_the_cell_its_share_of_heat(barostat):
    """W ε² is kT for the single rate of an isotropic cell and for ε_ii, and half of it for ε_ij."""
    motion = LangevinNPT(2.0, T, barostat=barostat, barostat_time=4.0)
    evaluate = Evaluator(of(Gas()))
    atoms = Atoms("Cu2", cell=[LENGTH] * 3, pbc=True, positions=[[0, 0, 0], [2, 1, 1]])
    seeds = torch.arange(200)
    state = motion.init(prepare([atoms] * 200), evaluate, seeds=seeds)
    rate, rates = state.strain_rate, []
    for step in range(120):
        state = replace(state, n_steps=state.n_steps + 1)
        rate = motion._thermalized_rate(state, rate)
        if step > 20:
            rates.append(rate)
    energy = float(motion._mass(state.degrees)[0]) * torch.cat(rates).square().mean(dim=0) / KT
    # Some 8,000 independent samples of each component: 1.6 % of a variance.
    for k in range(3):
        assert float(energy[k, k]) == pytest.approx(1.0, rel=0.07)
    others = energy[*torch.triu_indices(3, 3, 1)]
    expected = 0.0 if barostat == "isotropic" else 0.5
    assert torch.allclose(others, torch.full_like(others, expected), atol=0.035)


def elastic_averages(n_atoms, pressure):
    """Return ⟨G⟩ and var G of p(G) ~ V^(N - 3) exp(-(U + PV)/kT), G = h hᵀ / L².

    The cell's measure dh det(h)^-2 is dG det(G)^(-1/2) det(G)^-1 and a rotation; atoms give V^N.
    By samples of the Gaussian that U alone is, weighed; no length is zero within eight deviations.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60_000, 3, 3, dtype=torch.float64, generator=generator)
    noise = torch.tril(noise, -1) / 2**0.5 + torch.diag_embed(noise.diagonal(dim1=1, dim2=2))
    lower = torch.tril(noise, -1)
    metric = torch.eye(3) + (KT / STIFFNESS) ** 0.5 * (noise + lower.transpose(1, 2))
    volume = torch.linalg.det(metric).sqrt()
    weight = volume ** (n_atoms - 3) * torch.exp(-pressure * LENGTH**3 * volume / KT)
    weight = (weight / weight.sum())[:, None, None]
    mean = (weight * metric).sum(dim=0)
    return mean, (weight * (metric - mean) ** 2).sum(dim=0)


@pytest.mark.slow  # its default companions: a step preserves the measure, enthalpy is conserved
def test_a_full_cell_has_the_distribution_of_its_pressure_and_elasticity():
    n_atoms, n_systems, pressure = 8, 150, 2e-4
    scaled = torch.rand(n_systems, n_atoms, 3, generator=torch.Generator().manual_seed(1))
    structures = [
        Atoms(f"Cu{n_atoms}", cell=[LENGTH] * 3, pbc=True, scaled_positions=own.numpy())
        for own in scaled
    ]
    motion = LangevinNPT(
        8.0, T, friction_time=50.0, pressure=pressure, barostat="full", barostat_time=60.0
    )
    evaluate = Evaluator(of(ElasticCell()))
    state = motion.init(prepare(structures), evaluate)
    metrics, rates = [], []
    for step in range(240):
        state = motion.step(state, evaluate)
        if step > 60:
            cell = state.graph.cell / LENGTH
            metrics.append(torch.bmm(cell, cell.transpose(1, 2)))
            rates.append(state.strain_rate)
    assert not state.failed.any()
    assert torch.equal(state.strain_rate, state.strain_rate.transpose(1, 2))
    metrics, rates = torch.cat(metrics), torch.cat(rates)
    mean, variance = elastic_averages(n_atoms, pressure)
    measured = (metrics - metrics.mean(dim=0)).square().mean(dim=0)
    diagonal, other = torch.eye(3, dtype=torch.bool), torch.triu(torch.ones(3, 3), 1).bool()
    # 150 cells of some ten independent samples each: 0.003 of G, 4 % of its variance; components
    # of a kind are averaged. Measures that differ by one power of V differ by 0.007 in G.
    assert float(metrics.mean(dim=0)[diagonal].mean()) == pytest.approx(
        float(mean[diagonal].mean()), abs=0.006
    )
    assert metrics.mean(dim=0)[other].abs().max() < 0.012
    for kind in (diagonal, other):
        assert float(measured[kind].mean()) == pytest.approx(float(variance[kind].mean()), rel=0.1)
    # Equipartition: W ε_ii² is kT, and so is W (ε_ij² + ε_ji²); of an oscillator's velocities at
    # whole steps the splitting loses (ω dt)² / 4, here with ω² = 4 k / W.
    mass = float(motion._mass(state.degrees)[0])
    energy = mass * rates.square().mean(dim=0) / KT / (1 - STIFFNESS / mass * motion.timestep**2)
    assert float(energy[diagonal].mean()) == pytest.approx(1.0, rel=0.06)
    assert float(energy[other].mean()) == pytest.approx(0.5, rel=0.06)


@pytest.mark.slow
def test_the_mean_pressure_tensor_of_crystals_is_the_target():
    pressure = 3 * GPA
    motion = LangevinNPT(
        4.0, T, friction_time=80.0, pressure=pressure, barostat="full", barostat_time=100.0
    )
    evaluate = Evaluator(of(Pairs(cutoff=4.0)))
    start = prepare([crystal(seed=k, a=3.45) for k in range(32)])
    state = motion.init(start, evaluate)
    work, degrees = [], state.degrees.double()
    for step in range(240):
        state = motion.step(state, evaluate)
        if step > 100:
            work.append(state.graph.volume()[:, None, None] * state.stress())
    assert not state.failed.any()
    eye = torch.eye(3, dtype=torch.float64)
    volume = float(state.graph.volume().mean())
    mean = -torch.cat(work).mean(dim=0) / volume  # ⟨V P_inside⟩ / ⟨V⟩
    # ⟨V (P_inside - P)⟩ = -⟨2 K / n⟩ = -kT: the cell's own motion takes its share.
    expected = (pressure - KT / volume) * eye
    spread = float(torch.stack(work).mean(dim=0).std(dim=0).max()) / volume / 32**0.5
    assert torch.allclose(mean, expected, atol=4 * spread), (mean / GPA, spread / GPA)
    assert 4 * spread < 0.5 * pressure
    assert float(state.kinetic_energy().mean() / degrees.mean()) == pytest.approx(KT / 2, rel=0.2)
