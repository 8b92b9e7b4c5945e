"""The laws of physics on a model, for whoever writes one, inside this package or outside of it.

They are those of any calculator, measured in batches, and what only a model can be asked: whether a
batch is what its structures are, and whether its forces can be differentiated, for Hessians and
for training.
"""

import copy
from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from atomeq.calculators.ase import AtomeqCalculator, has_volume
from atomeq.check.laws import Evaluation, Law, LawResult, Measured, NotApplicable, Subject, largest
from atomeq.check.physical_laws import PHYSICAL_LAWS, turned
from atomeq.graph.builders import HyperGraph
from atomeq.graph.hyperedges import fix_topology
from atomeq.models.base import AtomisticModel
from atomeq.potential.checkpoint import scatter_weights
from atomeq.potential.derivatives import force_constants
from atomeq.potential.potential import Potential
from atomeq.typing import PropertyKey

_ELEMENTS = ("Cu", "Al", "Si", "O", "C", "H")  # of models that know them all
_MAX_ATOMS = 256  # in a batch
_MAX_EDGES = 20_000
_STEP = 1e-4  # Å, of differences of forces
_WEIGHT_STEP = 1e-5
_NO_FORCE = 1e-6  # eV/Å
_BEYOND = (0.02, 0.03, -0.01)  # Å
_QUARTER_TURN = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])


class ModelSubject(Subject):
    """A potential under test, computed in batches, with small structures to test it on.

    Args:
        potential: In float64; its structures become graphs as it builds them.
        elements: Chemical symbols it knows, at least one.
        structures: What laws of any structure are held on, with a periodic one and one that is
            not; by default cells and clusters of the elements.
    """

    repeats = (2, 1, 1)

    def __init__(
        self, potential: Potential, elements: Sequence[str], structures: Sequence[Atoms] = ()
    ) -> None:
        super().__init__(lambda: AtomeqCalculator(potential), elements)
        self.potential = potential
        self.structures = structures
        self.reach = potential.cutoff + 0.5

    def samples(self) -> list[Atoms]:
        """Return the structures for laws of any structure."""
        return [atoms.copy() for atoms in self.structures] or super().samples()

    def crystal(self, purpose: str = "crystal") -> Atoms:
        """Return the first of the structures that is periodic, or a cell of the elements."""
        given = (atoms.copy() for atoms in self.structures if atoms.pbc.all())
        return next(given, None) or super().crystal(purpose)

    def evaluate(self, atoms: Atoms, *, calculator: Calculator | None = None) -> Evaluation:
        """Compute one structure, without a calculator if none is given."""
        if calculator is not None:
            return super().evaluate(atoms, calculator=calculator)
        return self.evaluate_all([atoms])[0]

    def energy(self, atoms: Atoms, *, calculator: Calculator | None = None) -> float:
        """Compute the energy of a structure, without a calculator if none is given."""
        if calculator is not None:
            return super().energy(atoms, calculator=calculator)
        return float(self.energies([atoms])[0])

    def energies(self, structures: Sequence[Atoms]) -> np.ndarray:
        """Compute the energies of many structures, (n_structures,) eV."""
        found = [self.compute(few, ("energy",))["energy"] for few in _batches(structures)]
        return np.concatenate(found)

    def evaluate_all(self, structures: Sequence[Atoms]) -> list[Evaluation]:
        """Compute many structures, in batches."""
        found = []
        for few in _batches(structures):
            stress = self.has_stress and all(has_volume(atoms) for atoms in few)
            properties: list[PropertyKey] = ["energy", "forces"]
            if stress:
                properties.append("stress")
            results = self.compute(few, properties)
            stops = list(accumulate(len(atoms) for atoms in few))
            forces = np.split(results["forces"], stops[:-1])
            for k, energy in enumerate(results["energy"]):
                one = results["stress"][k] if stress else None
                found.append(Evaluation(float(energy), forces[k], one))
        return found

    def along(self, atoms: Atoms, positions: Sequence[np.ndarray]) -> list[Evaluation]:
        """Compute one object at many positions, where it keeps what it is."""
        atoms = atoms.copy()
        builder = self.potential.model.graph_builder()
        if isinstance(builder, HyperGraph) and builder.perceive:
            fix_topology(atoms)
        moved = [atoms.copy() for _ in positions]
        for one, each in zip(moved, positions, strict=True):
            one.positions = each
        return self.evaluate_all(moved)

    def compute(
        self, structures: Sequence[Atoms], properties: Sequence[PropertyKey]
    ) -> dict[str, np.ndarray]:
        """Compute structures in one batch; as the potential returns it, in arrays."""
        graph = self.potential.build_graph(structures)
        results = self.potential(graph, properties, create_graph=False)
        return {str(key): value.detach().numpy() for key, value in results.items()}


def validate_model(
    model: AtomisticModel | Potential,
    *,
    elements: Sequence[str] | None = None,
    structures: Sequence[Atoms] = (),
    only: Collection[str] | None = None,
) -> list[LawResult]:
    """Hold a model to the laws of physics that every model of the package keeps.

    Derivatives, symmetries, extensivity, smoothness at the cutoff, batches, and the derivatives of
    forces that Hessians and training need; in float64, on a copy, in seconds for a small model.

    Args:
        model: Where its forces are zero, as those of a model whose last layer starts at zero, the
            weights of the copy are moved away from there.
        elements: Chemical symbols of the test structures; by default what a potential knows.
        structures: In place of our own test structures, some that are small and without symmetry.
        only: Names of the laws to measure.

    Returns:
        The verdicts. One that is not passed is exempt, or does not apply.

    Raises:
        ValueError: A law is broken, or kept in spite of an exemption in ``exempt_laws``; the
            message has them all, with the figures.

    Example:
        >>> from atomeq.models.egnn import EGNN
        >>> model = EGNN(num_layers=1, hidden_channels=8)
        >>> validate_model(model, only=["permutation"])[0].passed
        True
    """
    potential = model if isinstance(model, Potential) else Potential(model)
    potential = copy.deepcopy(potential).cpu().double().eval().requires_grad_(True)
    subject = ModelSubject(potential, list(elements or _known(potential)), structures)
    if not _feels(subject):
        scatter_weights(potential)
    if not _feels(subject):
        raise ValueError("the model's forces are zero whatever its weights: any law would hold")
    names = [law.name for law in MODEL_LAWS]
    if unknown := set(only or ()) - set(names):
        raise ValueError(f"there is no law {min(unknown)!r}; laws are {', '.join(names)}")
    results = [law.judge(subject) for law in MODEL_LAWS if only is None or law.name in only]
    faults = [fault for result in results if (fault := fault_of(result, subject))]
    if faults:
        raise ValueError(f"{type(potential.model).__name__} breaks laws: {'; '.join(faults)}")
    return results


def fault_of(result: LawResult, subject: Subject) -> str:
    """Return what is wrong with a verdict, nothing if nothing is."""
    if result.passed is False:
        figure = f"{result.figure:.2g} {result.unit}, allowed {result.tolerance:.2g}"
        return f"{result.name} ({figure}) {result.note}".rstrip()
    if result.passed and result.name in subject.exempt_laws:
        return f"{result.name} holds, in spite of its exemption"
    return ""


def batch(subject: ModelSubject) -> Measured:
    """Compute structures together and one by one."""
    structures = subject.samples()
    together = subject.compute(structures, ("energy", "forces"))
    apart = [subject.evaluate(atoms) for atoms in structures]
    forces = np.concatenate([found.forces for found in apart])
    energies = np.array([found.energy for found in apart])
    return Measured(
        max(largest(together["energy"] - energies), largest(together["forces"] - forces))
    )


def net_force(subject: ModelSubject) -> Measured:
    """Add up the forces of a structure."""
    return Measured(max(largest(f.forces.sum(0)) for f in subject.evaluate_all(subject.samples())))


def poles(subject: ModelSubject) -> Measured:
    """Put three atoms on a line along each axis and beside it: edge frames have their poles there.

    Energies and forces have to be those of the same line off the axes.
    """
    symbols = [subject.elements[k % len(subject.elements)] for k in range(3)]
    lines = []
    for axis in range(3):
        for tilt in (0.0, 1e-8, 1e-4):
            positions = np.zeros((3, 3))
            positions[:, axis] = [-1.2, 0.0, 1.1]
            positions[2, (axis + 1) % 3] += tilt
            lines.append(Atoms(symbols, positions))
    on_axis = subject.evaluate_all(lines)
    off = subject.evaluate_all([turned(line, _QUARTER_TURN) for line in lines])
    pairs = zip(on_axis, off, strict=True)
    return Measured(max(one.turned(_QUARTER_TURN).distance(other) for one, other in pairs))


def receptive_depth(subject: ModelSubject) -> Measured:
    """Move an atom of a chain beyond the depth that is declared, and look at the chain's end."""
    potential = subject.potential
    depth = potential.receptive_depth
    if depth is None:
        raise NotApplicable("an energy may depend on all of a structure")
    still = chain(potential.cutoff, depth + 2, subject.elements)
    moved = still.copy()
    moved.positions[depth + 1 :] += _BEYOND
    first, second = (subject.compute([one], ("energies",))["energies"] for one in (still, moved))
    return Measured(float(abs(second[0] - first[0])), f"depth {depth}")


def chain(cutoff: float, n_atoms: int, elements: Sequence[str]) -> Atoms:
    """Return atoms that see the next one alone, (n_atoms,), no three of them on a line.

    Args:
        cutoff: Å.
        n_atoms: How many.
        elements: Chemical symbols, taken in turn.
    """
    steps = np.arange(n_atoms)
    positions = np.stack([0.52 * steps, 0.14 * (steps % 2), 0.05 * (steps % 3)], axis=1)
    return Atoms([elements[k % len(elements)] for k in range(n_atoms)], cutoff * positions)


def second_derivative(subject: ModelSubject) -> Measured:
    """Compare the Hessian with differences of the forces."""
    if not subject.potential.twice_differentiable:
        raise NotApplicable("a force head has no second derivative of an energy")
    atoms = subject.samples()[-1]
    graph = subject.potential.build_graph(atoms)
    hessian = force_constants(subject.potential, graph, max_edges=_MAX_EDGES).numpy()
    moved, columns = [], [0, 3 * (len(atoms) // 2) + 2, 3 * len(atoms) - 2]
    for column in columns:
        for sign in (1, -1):
            moved.append(atoms.copy())
            moved[-1].positions.flat[column] += sign * _STEP
    forces = [found.forces.ravel() for found in subject.evaluate_all(moved)]
    differences = [(b - a) / (2 * _STEP) for a, b in zip(forces[::2], forces[1::2], strict=True)]
    return Measured(largest(hessian[columns] - np.array(differences)))


def gradient_of_force_loss(subject: ModelSubject) -> Measured:
    """Compare the derivative of a loss of forces along random weights with differences.

    Training on forces needs the gradients of forces by weights, and each operation's second one.
    """
    potential, generator = subject.potential, torch.Generator().manual_seed(3)
    graph = potential.build_graph(subject.crystal())
    parameters = [p for p in potential.parameters() if p.requires_grad]
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss(*, create_graph: bool) -> Tensor:
        return (potential(graph, ("forces",), create_graph=create_graph)["forces"] ** 2).mean()

    potential.zero_grad(set_to_none=True)
    loss(create_graph=True).backward()
    slope = sum(
        float((p.grad * d).sum())
        for p, d in zip(parameters, direction, strict=True)
        if p.grad is not None
    )
    potential.zero_grad(set_to_none=True)
    values = []
    # Four points: some models bend so much that two would leave an error of the tolerance's size.
    for shift in (1, -1, 2, -2):
        for p, d in zip(parameters, direction, strict=True):
            p.data += shift * _WEIGHT_STEP * d
        values.append(float(loss(create_graph=False).detach()))
        for p, d in zip(parameters, direction, strict=True):
            p.data -= shift * _WEIGHT_STEP * d
    difference = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * _WEIGHT_STEP)
    return Measured(abs(slope - difference) / abs(difference), "relative")


def _feels(subject: ModelSubject) -> bool:
    """Whether there are forces at all."""
    return any(largest(one.forces) > _NO_FORCE for one in subject.evaluate_all(subject.samples()))


def _batches(structures: Sequence[Atoms]) -> list[list[Atoms]]:
    """Split structures into batches of so many atoms, each with volumes throughout or nowhere."""
    batches: list[list[Atoms]] = []
    n_atoms, before = 0, None
    for atoms in structures:
        kind = has_volume(atoms)
        n_atoms += len(atoms)
        if kind is not before or n_atoms > _MAX_ATOMS:
            batches.append([])
            n_atoms, before = len(atoms), kind
        batches[-1].append(atoms)
    return batches


def _known(potential: Potential) -> list[str]:
    known = [chemical_symbols[z] for z in potential.elements]
    common = [symbol for symbol in _ELEMENTS if atomic_numbers[symbol] in potential.elements]
    return common if len(known) > len(_ELEMENTS) and common else known[: len(_ELEMENTS)]


_ELSEWHERE = ("NVE drift",)  # for minutes; atomeq check measures it
MODEL_LAWS: tuple[Law, ...] = (
    *(law for law in PHYSICAL_LAWS if law.name not in _ELSEWHERE),
    Law("batch equals single", batch, "eV, Å", 1e-10, 1e-4),
    Law("forces sum to zero", net_force, "eV/Å", 1e-10, 1e-4),
    Law("edges on the poles", poles, "eV, Å", 1e-9, 1e-4),
    Law("energies end at the receptive depth", receptive_depth, "eV", 1e-12, 1e-5),
    Law("Hessian is the gradient of the forces", second_derivative, "eV/Å²", 1e-5, 1e-2),
    Law("gradient of a force loss", gradient_of_force_loss, "", 1e-5, 1e-2),
)
