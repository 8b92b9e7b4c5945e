"""LoRA and rates by part: what is trained, and that what is saved is an ordinary potential."""

from pathlib import Path

import pytest
import torch
from ase.build import bulk, molecule
from torch import nn

from atomeq.models.base import AtomisticModel
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.escn import ESCN
from atomeq.models.mace import MACE
from atomeq.models.nequip import NequIP
from atomeq.potential.checkpoint import load_potential, save_potential, scatter_weights
from atomeq.potential.potential import Potential
from atomeq.training.low_rank import LoRA, LowRankUpdate, add_low_rank_updates, merged
from atomeq.training.parameters import freeze_parts, make_optimizer, parameter_groups

NETWORKS = {
    "nequip": lambda: NequIP(4.0, irreps=["4x0e", "4x0e+4x1o", "4x0e"], radial_channels=[8]),
    "mace": lambda: MACE(
        4.0, irreps="4x0e+4x1o", lmax_edge=1, correlation=2, radial_channels=[8],
        elements=[1, 8, 29],
    ),
    "escn": lambda: ESCN(
        4.0, lmax=1, mmax=1, num_layers=1, sphere_channels=8, hidden_channels=8, edge_channels=8
    ),
    "equiformer_v2": lambda: EquiformerV2(
        4.0, lmax=1, mmax=1, num_layers=1, sphere_channels=8, attn_hidden_channels=8, num_heads=2,
        attn_alpha_channels=8, ffn_hidden_channels=8, edge_channels=8, num_elements=30,
    ),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def potential(request: pytest.FixtureRequest) -> Potential:
    potential = Potential(NETWORKS[request.param]()).double()
    scatter_weights(potential)
    return potential


def answers(potential: Potential) -> torch.Tensor:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    graph = potential.build_graph([atoms, molecule("H2O")])
    found = potential(graph, ("energy", "forces"), create_graph=True)
    return torch.cat([found["energy"], found["forces"].flatten()])


def test_updates_begin_at_nothing_are_all_that_is_trained_and_are_merged(
    potential: Potential, tmp_path: Path
):
    before = answers(potential).detach()
    names = set(potential.state_dict())
    add_low_rank_updates(potential.model, LoRA(rank=2))
    # What is fixed now may be served by other kernels, hence not to the last bit.
    torch.testing.assert_close(answers(potential).detach(), before, rtol=1e-12, atol=1e-12)
    trained = {name for name, p in potential.named_parameters() if p.requires_grad}
    updates = [m for m in potential.modules() if isinstance(m, LowRankUpdate)]
    assert len(trained) == 2 * len(updates) > 8
    assert all(name.endswith((".up", ".down")) for name in trained)
    optimizer = torch.optim.Adam(parameter_groups(potential), lr=0.05)
    for _ in range(2):  # in the first step only B has a gradient
        optimizer.zero_grad()
        answers(potential).square().sum().backward()
        assert all(update.up.grad is not None for update in updates)
        optimizer.step()
    after = answers(potential).detach()
    change = float((after - before).abs().max())
    assert change > 0.01 * float(before.abs().max())

    save_potential(merged(potential), tmp_path / "saved")
    loaded = load_potential(tmp_path / "saved")
    assert set(loaded.state_dict()) == names
    torch.testing.assert_close(answers(loaded).detach(), after, rtol=0, atol=1e-3 * change)


def test_an_update_has_its_rank_in_each_matrix_of_a_stack():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 3, 5)
    for stacked_by, n in ((0, 6), (1, 3)):
        update = LowRankUpdate(weight, 2, stacked_by=stacked_by, generator=generator)
        nn.init.normal_(update.up)
        change = (update(weight) - weight).movedim(stacked_by, 0)
        assert change.shape[0] == n
        assert torch.linalg.matrix_rank(change).tolist() == [2] * n


def test_parts_are_chosen_by_name_and_wrong_ones_refused(potential: Potential):
    network = potential.model
    part = next(name for name, _ in network.named_children() if name in ("layers", "blocks"))
    with pytest.raises(ValueError, match=r"no linear map .*'nowhere'"):
        add_low_rank_updates(network, LoRA(parts=("nowhere",)))
    add_low_rank_updates(network, LoRA(rank=1, parts=(f"{part}.0",)))
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith(f"{part}.0.") for name in trained)
    with pytest.raises(ValueError, match="1 or more"):
        LoRA(rank=0)


def rates_of(network: AtomisticModel, **rates: float) -> dict[str, float]:
    """Return the learning rate of each trained parameter where that of the optimizer is 1."""
    freeze_parts(network, rates)
    optimizer = make_optimizer(lambda g: torch.optim.AdamW(g, lr=1.0), network, "weights", rates)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in network.named_parameters() if id(p) in by_id}


def test_rates_freeze_and_slow_parts_and_the_last_one_counts():
    rates = rates_of(NETWORKS["escn"](), **{"*": 0.0, "layers": 0.25, "layers.*.update": 0.5})
    layers = {n: r for n, r in rates.items() if n.startswith("layers.")}
    assert layers == rates
    assert set(rates.values()) == {0.25, 0.5}
    assert all((r == 0.5) == (".update." in n) for n, r in rates.items())
    rates = rates_of(NETWORKS["escn"](), embedding=0.1)
    assert {n for n, r in rates.items() if r != 1.0} == {"embedding.weight"}


def test_rates_that_do_not_fit_are_refused():
    for rates, said in (
        ({"layer": 0.1}, "no part 'layer'; it has .*layers"),
        ({"layers": -1.0}, ">= 0"),
        ({"*": 0.0}, "nothing to train"),
    ):
        with pytest.raises(ValueError, match=said):
            freeze_parts(NETWORKS["escn"](), rates)
