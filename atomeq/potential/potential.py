"""Potential: a model and its references become energy, forces and stress.

The same object serves training, the ASE calculator, dynamics and screening.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.models.frame_averaged import Canonicalized
from atomeq.ops.c_compiler import torch_on_one_thread
from atomeq.ops.edge.escn_conv import differentiated_once
from atomeq.ops.precision import use_precision
from atomeq.ops.segment.operations import segment_sum
from atomeq.potential.blocks import divisible, energies_in_blocks
from atomeq.potential.derivatives import (
    energy_and_derivatives,
    refuse_flat_cells,
    with_born_effective_charges,
)
from atomeq.potential.distances import SHORTEST, KnownDistances
from atomeq.potential.predictor import Predictor, full_precision
from atomeq.potential.references import AtomicReferences
from atomeq.potential.terms import EnergyTerm
from atomeq.potential.uncertainty import UNCERTAINTIES, LastLayerUncertainty
from atomeq.typing import ElectricProperty, PropertyKey

logger = logging.getLogger(__name__)

_GUESS = (
    "its numbers are guesses there and may be far off. Look at the structure, or add the repulsion "
    f"of nuclei: `atomeq potentials install NAME --zbl`, AtomeqCalculator(terms=[ZBL({SHORTEST})])"
)
#: What a model may have beside energies, forces and stress.
ELECTRIC: tuple[PropertyKey, ...] = (*get_args(ElectricProperty), "born_effective_charges")
_PROPERTIES: tuple[PropertyKey, ...] = (
    "energy",
    "energies",
    "forces",
    "gradient_forces",
    "orientation",
    "stress",
    *ELECTRIC,
    *UNCERTAINTIES,
)


_DERIVABLE: tuple[PropertyKey, ...] = ("forces", "stress")


class Potential(Predictor):
    """Energy, forces and stress of a batch of structures.

    What the model returns is taken, what is missing is derived: a conservative model's forces are
    -dE/dx, a model with a head for forces or stress keeps its own.

    Args:
        model: The network.
        references: Shift per element and scale; none leaves the network's output as eV.
        terms: Known physics that is added, such as :class:`~atomeq.potential.repulsion.ZBL`.

    Attributes:
        distances: The shortest ones that it knows; a structure with a shorter one is told of once.
        uncertainty: What says how far off it may be, where it was calibrated.

    Raises:
        ValueError: Terms beside a force head, which would not feel them.

    Example:
        >>> potential = load_potential("cu-pbe")  # doctest: +SKIP
        >>> graph = potential.build_graph(ase.build.bulk("Cu"))  # doctest: +SKIP
        >>> potential(graph, ("energy", "forces", "stress"))["energy"]  # doctest: +SKIP
    """

    def __init__(
        self,
        model: AtomisticModel,
        references: AtomicReferences | None = None,
        *,
        terms: Sequence[EnergyTerm] = (),
    ) -> None:
        super().__init__(model, references)
        self.terms = nn.ModuleList()
        self.add_terms(terms)
        self.distances = KnownDistances()
        self.uncertainty: LastLayerUncertainty | None = None

    def add_terms(self, terms: Sequence[EnergyTerm]) -> None:
        """Add known physics.

        Raises:
            ValueError: Beside a head for forces or stress, which would not feel it.
        """
        heads = sorted({"forces", "stress"} & self.model.outputs)
        if terms and heads:
            raise ValueError(
                f"{type(self.model).__name__} has a {heads[0].replace('forces', 'force')} head, "
                f"which would not know of {type(terms[0]).__name__}; add terms to conservative "
                "models"
            )
        self.terms.extend(terms)

    def forward(
        self,
        graph: AtomGraph,
        properties: Sequence[PropertyKey] = ("energy", "forces"),
        *,
        create_graph: bool | None = None,
    ) -> dict[PropertyKey, Tensor]:
        """Compute properties of a batch of structures.

        Args:
            graph: As :meth:`build_graph` returns it.
            properties: What to compute.
            create_graph: Keep forces and stress differentiable; by default in training mode only.

        Returns:
            ``energy`` (n_graphs,) eV and ``energies`` (n_atoms,) eV in float64; ``forces``
            (n_atoms, 3) eV/Å; ``stress`` (n_graphs, 3, 3) eV/Å³, positive when stretched; of a
            model with a force head also ``gradient_forces``, what -dE/dx is, without a gradient; of
            a :class:`~atomeq.models.frame_averaged.Canonicalized` one ``orientation`` (n_graphs, 3,
            3), the frames in which its network sees the structures, NaN of those without one; of
            an :class:`~atomeq.models.electric.Electric` one ``dipole`` (n_graphs, 3) e·Å,
            ``quadrupole`` (n_graphs, 3, 3) e·Å², ``polarizability`` (n_graphs, 3, 3) e²·Å²/eV and
            the derivative ``born_effective_charges`` (n_atoms, 3, 3) e, [atom, dipole, position];
            of a calibrated one what :class:`~atomeq.potential.uncertainty.LastLayerUncertainty`
            gives.

        Raises:
            ValueError: An unknown property, the stress of a structure without volume, an
                uncertainty of a potential that was not calibrated, or a moment of one without.
        """
        self.check_electrons(graph)
        if self.training:  # in mixed precision perhaps
            return self._compute(graph, properties, create_graph)
        self.warn_of_distances(graph)
        with full_precision(graph.pos.device):
            try:
                return self._compute(graph, properties, create_graph)
            except RuntimeError:  # autograd refuses weights that were made inside inference mode
                if not self._leave_inference_mode():
                    raise
                return self._compute(graph, properties, create_graph)

    def warn_of_distances(self, graph: AtomGraph) -> None:
        """Warn of a structure with a distance that is not known, the first one that comes."""
        found = self.distances.first_shorter(graph)
        if found is not None:
            repelled = any(node["class_path"].endswith(".ZBL") for node in self.term_configs())
            advice = "only its repulsion of nuclei is to be trusted there" if repelled else _GUESS
            logger.warning("%s; potential %r: %s (said once)", found, self.name, advice)

    def _compute(
        self, graph: AtomGraph, properties: Sequence[PropertyKey], create_graph: bool | None
    ) -> dict[PropertyKey, Tensor]:
        refuse_unknown_properties(properties)
        self.refuse_missing(properties)
        if "stress" in properties:
            if not self.gives_stress:
                raise ValueError(
                    "a model with a force head has no energy whose strain gives a stress"
                )
            refuse_flat_cells(graph)
        if not set(UNCERTAINTIES).isdisjoint(properties):
            self.refuse_uncalibrated()
        return self.derive(graph, properties, create_graph=create_graph)

    def derive(
        self,
        graph: AtomGraph,
        properties: Sequence[PropertyKey],
        *,
        create_graph: bool | None = None,
    ) -> dict[PropertyKey, Tensor]:
        """Compute what :meth:`forward` does, which has refused, and look at no value on the way.

        A CUDA graph can record it. A cell without a volume gives a stress that is no number.

        Args:
            graph: As of :meth:`forward`.
            properties: Likewise.
            create_graph: Likewise.

        Returns:
            As :meth:`forward`.
        """
        derived: list[PropertyKey] = [
            key for key in _DERIVABLE if key in properties and key not in self.model.outputs
        ]
        evaluate = self.evaluate
        if not set(UNCERTAINTIES).isdisjoint(properties):
            evaluate = partial(self.evaluate, uncertainty=self.uncertainty)
        if create_graph is None:
            create_graph = self.training and torch.is_grad_enabled()
        little = not (create_graph or torch.compiler.is_compiling())
        little = little and self.model.leaves_torch_little(graph)
        with use_precision(self.precision), torch_on_one_thread() if little else nullcontext():
            if "gradient_forces" in properties:
                computed = self._evaluate_with_gradient(evaluate, graph)
            elif derived:
                computed = energy_and_derivatives(
                    partial(evaluate, once=not create_graph),
                    graph,
                    forces="forces" in derived,
                    stress="stress" in derived,
                    create_graph=create_graph,
                )
            elif "born_effective_charges" not in properties:
                computed = evaluate(graph)
            else:
                computed = {}
            if "born_effective_charges" in properties:
                own = with_born_effective_charges(evaluate, graph, create_graph=create_graph)
                computed = own | computed
        if "orientation" in properties:
            assert isinstance(self.model, Canonicalized)
            computed["orientation"] = self.model.orientation(graph)
        for key in derived:
            computed[key] = self.references.of_derivative(key, computed[key])
        return {key: computed[key] for key in properties}

    @property
    def electric(self) -> tuple[PropertyKey, ...]:
        """Which of dipole, quadrupole, polarizability and Born effective charges it gives."""
        own = self.model.outputs
        derived: set[PropertyKey] = {"born_effective_charges"} if "dipole" in own else set()
        return tuple(key for key in ELECTRIC if key in own | derived)

    @property
    def learnable(self) -> tuple[PropertyKey, ...]:
        """What it gives that there are labels of."""
        stress: tuple[PropertyKey, ...] = ("stress",) if self.gives_stress else ()
        energies: tuple[PropertyKey, ...] = ("energy", "forces", *stress)
        return (*(energies if self.gives_energies else ()), *self.electric)

    def refuse_missing(self, properties: Sequence[PropertyKey]) -> None:
        """Raise ``ValueError`` naming the first property that its model has nothing to give for."""
        if not self.gives_energies and (others := set(properties) - set(self.electric)):
            raise ValueError(
                f"potential {self.name!r} was made for {', '.join(self.electric)} alone: it has no "
                f"energy and so no {sorted(others)[0]}"
            )
        if "orientation" in properties and not isinstance(self.model, Canonicalized):
            raise ValueError(
                f"potential {self.name!r} chooses no orientation: its {type(self.model).__name__} "
                "sees structures as they lie; put it into a Canonicalized model"
            )
        missing = [key for key in properties if key in ELECTRIC and key not in self.electric]
        if missing:
            raise ValueError(
                f"potential {self.name!r} gives no {missing[0]}: its model is none with electric "
                "moments; train one, Electric(model, properties=[...])"
            )

    def _leave_inference_mode(self) -> bool:
        """Put clones in place of weights that inference mode made; return whether there were any.

        Looking at every tensor costs as much as a small model's energy, so it is done on failure.
        """
        with torch.inference_mode(False):
            inference = [one for one in (*self.parameters(), *self.buffers()) if one.is_inference()]
            normal = {id(one): one.clone() for one in inference}
            for module in self.modules():
                for name, one in (*module._parameters.items(), *module._buffers.items()):
                    if one is None or (clone := normal.get(id(one))) is None:
                        continue
                    if isinstance(one, nn.Parameter):
                        clone = nn.Parameter(clone, one.requires_grad)
                    setattr(module, name, clone)
        return bool(normal)

    @property
    def uncertainties(self) -> tuple[PropertyKey, ...]:
        """What it gives beside its results, once it is calibrated."""
        return () if self.uncertainty is None else UNCERTAINTIES

    def refuse_uncalibrated(self) -> None:
        """Raise ``ValueError`` where it does not know its uncertainty."""
        if not self.uncertainties:
            raise ValueError(
                f"potential {self.name!r} does not know its uncertainty; calibrate it with `atomeq "
                "calibrate` on its training set and on structures it was not trained on"
            )

    def _evaluate_with_gradient(
        self, evaluate_head: Callable[[AtomGraph], dict[PropertyKey, Tensor]], graph: AtomGraph
    ) -> dict[PropertyKey, Tensor]:
        if self.conservative:
            raise ValueError(
                "gradient_forces are for models with a force head; here the forces are -dE/dx"
            )
        heads: list[Tensor] = []

        def evaluate(deformed: AtomGraph) -> dict[PropertyKey, Tensor]:
            computed = evaluate_head(deformed)
            heads.append(computed.pop("forces"))
            return computed

        # create_graph keeps energy and head differentiable; the gradient itself is a target.
        computed = energy_and_derivatives(evaluate, graph, create_graph=True)
        computed["gradient_forces"] = computed["forces"].detach()
        computed["forces"] = heads[0]
        return computed

    def evaluate(
        self,
        graph: AtomGraph,
        *,
        uncertainty: LastLayerUncertainty | None = None,
        once: bool = False,
    ) -> dict[PropertyKey, Tensor]:
        """Return what needs no derivative: energy, energies, forces and stress of heads, and σ.

        Args:
            graph: As of :meth:`forward`.
            uncertainty: What gives σ, where it is wanted.
            once: Nobody differentiates by weights, and by positions and cells once at most.
        """
        once = once or not torch.is_grad_enabled()
        if once and uncertainty is None and divisible(self.model, graph):
            outputs: dict[PropertyKey, Tensor] = {"energies": energies_in_blocks(self.model, graph)}
        else:
            with differentiated_once(once):
                outputs = self.model(graph)
        if "energies" not in outputs:
            return dict(outputs)
        energies = self.references(outputs["energies"], graph.atomic_numbers)
        for term in self.terms:
            energies = energies + term(graph)
        offset = self.references.offset
        computed: dict[PropertyKey, Tensor] = {
            "energies": energies + (offset / graph.natoms)[graph.batch],  # they sum to the energy
            "energy": segment_sum(energies, graph.batch, graph.natoms.shape[0]) + offset,
        }
        for key in ELECTRIC:
            if key in outputs:
                computed[key] = outputs[key]
        if uncertainty is not None:
            computed.update(uncertainty(outputs["features"], graph))
        if "forces" in outputs or "stress" in outputs:
            heads = self.references.of_heads(outputs.get("forces"), outputs.get("stress"))
            computed.update(heads)
        return computed

    @property
    def gives_energies(self) -> bool:
        """Whether there are energies; else there are electric properties alone."""
        return "energies" in self.model.outputs

    @property
    def conservative(self) -> bool:
        """Whether forces are the derivative of the energy."""
        return "forces" not in self.model.outputs

    @property
    def gives_stress(self) -> bool:
        """Whether there is a stress: of a head, or the derivative that goes with such forces."""
        return self.conservative or "stress" in self.model.outputs

    @property
    def receptive_depth(self) -> int | None:
        """Edges to the farthest atom that an atom's energy depends on; None: it may be any."""
        terms = [term.receptive_depth for term in self.terms if isinstance(term, EnergyTerm)]
        depths = [self.model.receptive_depth, *terms]
        known = [depth for depth in depths if depth is not None]
        # An offset belongs to the structure, and no part of one has a share of it.
        everything = len(known) < len(depths) or bool(self.references.offset != 0)
        return None if everything else max(known)

    @property
    def twice_differentiable(self) -> bool:
        """Whether forces can be differentiated once more, for a Hessian."""
        return self.conservative

    def fingerprint(self) -> str:
        """Return a SHA-256 of what decides every result: configuration, terms and weights."""
        nodes = [self.model.config(), *self.term_configs()]
        digest = hashlib.sha256("".join(json.dumps(node, default=str) for node in nodes).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def term_configs(self) -> list[dict[str, Any]]:
        """Return the nodes of the terms."""
        return [term.config() for term in self.terms if isinstance(term, EnergyTerm)]


def refuse_unknown_properties(properties: Sequence[PropertyKey]) -> None:
    """Raise ``ValueError`` naming the first property that no potential has."""
    unknown = [key for key in properties if key not in _PROPERTIES]
    if unknown:
        raise ValueError(f"unknown property {unknown[0]!r}; ask for any of {_PROPERTIES}")
