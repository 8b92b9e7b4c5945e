"""validate_model finds what is wrong with a model, whoever wrote it."""

import pytest
import torch
from ase.build import molecule
from small_potential import small_potential
from structures import RATTLED

from atomeq.check.model import MODEL_LAWS, ModelSubject, validate_model
from atomeq.models.egnn import EGNN
from atomeq.ops.segment.operations import segment_sum


class Faulty(EGNN):
    """A model with one fault at a time."""

    fault = ""

    def forward(self, graph):
        energies = super().forward(graph)["energies"]
        vectors = graph.edge_vectors()
        lengths = vectors.norm(dim=1)
        target = graph.edge_index[1]
        if self.fault == "direction":
            energies = energies + 1e-3 * segment_sum(vectors[:, 2] ** 4, target, graph.n_atoms)
        if self.fault == "step":
            energies = energies + 1e-3 * segment_sum(lengths, target, graph.n_atoms)
        if self.fault == "order":
            weights = torch.linspace(0, 1, graph.n_atoms).to(energies)
            energies = energies * (1 + 1e-3 * weights)
        if self.fault == "batch":
            energies = energies + 1e-3 * graph.n_graphs * segment_sum(
                torch.exp(-lengths), target, graph.n_atoms
            )
        if self.fault == "field":
            energies = energies + 1e-3 * graph.pos[:, 0].to(energies)
        if self.fault == "detached":  # the value is right, the second derivative is not
            energies = energies + _HalfBlind.apply(energies)
        if self.fault == "farther":
            of_others = energies[graph.edge_index[0]]
            energies = energies + 1e-3 * segment_sum(of_others, target, graph.n_atoms)
        if self.fault == "nothing":
            energies = 0 * energies
        if self.fault == "fragments":
            energies = energies * energies.sum()
        return {"energies": energies}


class _HalfBlind(torch.autograd.Function):
    """The identity, whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 2 * x.detach()


def faulty(fault: str) -> EGNN:
    made = type("Faulty", (Faulty,), {"fault": fault})
    torch.manual_seed(0)
    model = made(cutoff=4.5, num_layers=1, hidden_channels=8)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_a_sound_model_keeps_every_law_and_is_left_as_it_was():
    potential = small_potential(torch.float32)
    before = potential.fingerprint()
    results = validate_model(potential)
    assert [result.name for result in results] == [law.name for law in MODEL_LAWS]
    assert all(result.passed for result in results)
    assert potential.fingerprint() == before
    assert potential.dtype == torch.float32


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("direction", "rotation"),
        ("step", "smooth at the cutoff"),
        ("order", "permutation"),
        ("batch", "batch equals single"),
        ("field", "forces sum to zero"),
        ("field", "translation"),
        ("detached", "Hessian is the gradient of the forces"),
        ("detached", "gradient of a force loss"),
        ("fragments", "separated fragments add"),
        ("fragments", "supercell extensivity"),
        ("farther", "energies end at the receptive depth"),
    ],
)
def test_a_planted_fault_is_found_by_its_law(fault, law):
    validate_model(faulty(""), elements=["Cu", "O"], only=[law])
    with pytest.raises(ValueError, match=f"Faulty breaks laws: {law}"):
        validate_model(faulty(fault), elements=["Cu", "O"], only=[law])


def test_an_exemption_excuses_a_broken_law_and_no_other():
    law = "separated fragments add"
    model = faulty("fragments")
    model.exempt_laws = {law: "it multiplies"}
    assert validate_model(model, elements=["Cu"], only=[law])[0].exempt == "it multiplies"
    sound = faulty("")
    sound.exempt_laws = {law: "it does not"}
    with pytest.raises(ValueError, match=f"{law} holds, in spite of its exemption"):
        validate_model(sound, elements=["Cu"], only=[law])


def test_a_model_that_starts_at_zero_is_moved_away_and_one_that_stays_there_is_not_sound():
    model = faulty("direction")
    for parameter in model.energy.parameters():
        parameter.data.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validate_model(EGNN(cutoff=4.5, num_layers=1, hidden_channels=8), only=["rotation"])
    with pytest.raises(ValueError, match="rotation"):
        validate_model(model, elements=["Cu"], only=["rotation"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="forces are zero whatever its weights"):
        validate_model(faulty("nothing"), elements=["Cu"])


def test_structures_may_be_ones_own():
    structures = [RATTLED["crystal"](), molecule("H2O")]
    results = validate_model(
        faulty(""), structures=structures, elements=["Mg", "O"], only=["rotation"]
    )
    assert results[0].passed
    with pytest.raises(ValueError, match="no law 'beauty'"):
        validate_model(faulty(""), elements=["Cu"], only=["beauty"])


def test_batches_are_what_single_structures_are():
    subject = ModelSubject(small_potential(), ["Cu", "Al"])
    structures = [subject.crystal(), subject.cluster(), subject.crystal("another")] * 12
    together = subject.evaluate_all(structures)
    energies = subject.energies(structures)
    for k in (0, 1, 2, 35):
        alone = subject.evaluate(structures[k])
        assert together[k].distance(alone) < 1e-10
        assert energies[k] == pytest.approx(alone.energy, abs=1e-10)
        assert (together[k].stress is None) == (alone.stress is None) == (k == 1)
