"""How coarse products may be belongs to who asks: a potential, a calculator, a thread."""

import threading
from collections.abc import Iterator

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from edge_layers import EdgeLayer
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.models.escn import ESCN
from atomeq.ops import dispatch
from atomeq.ops.dispatch import use_backend
from atomeq.ops.precision import matmul_precision, use_precision
from atomeq.potential.checkpoint import (
    CheckpointError,
    load_potential,
    save_potential,
    scatter_weights,
)
from atomeq.potential.committee import frozen
from atomeq.potential.potential import Potential

SINGLE = 1e-5  # of the largest number: rounding of single precision


@pytest.fixture
def kernels_on_cpu() -> Iterator[None]:
    """Triton's kernels, whose interpreter rounds operands of ``medium`` as a GPU would nearly."""
    pytest.importorskip("atomeq.ops.edge.triton.kernels", reason="Triton is not installed")
    with use_backend("triton"):
        yield


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max())


def test_a_block_asks_for_its_thread_alone() -> None:
    found = []
    with use_precision("medium"):
        thread = threading.Thread(target=lambda: found.append(matmul_precision()))
        thread.start()
        thread.join()
        with use_precision(None):
            assert matmul_precision() == "medium"
    assert found == [torch.get_float32_matmul_precision()] == [matmul_precision()]


@pytest.mark.triton
@pytest.mark.usefixtures("kernels_on_cpu")
def test_gradients_have_the_precision_of_their_call_in_whatever_thread() -> None:
    """A GPU's gradients are computed in another thread, after the block may have ended."""

    def gradient(during: str | None, after: str | None) -> torch.Tensor:
        layer = EdgeLayer(1, 1, channels=16, hidden=16, dtype=torch.float32, chiral=True)
        leaf, found = layer.leaves["x"], []
        with use_precision(during):
            value = layer("triton").square().sum()

        def backward() -> None:
            with use_precision(after):
                found.append(torch.autograd.grad(value, leaf)[0])

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        return found[0]

    exact, rounded = gradient("highest", "medium"), gradient("medium", "highest")
    assert torch.equal(exact, gradient(None, None))
    assert torch.equal(rounded, gradient("medium", "medium"))
    assert relative(rounded, exact) > SINGLE


@pytest.mark.triton
@pytest.mark.usefixtures("kernels_on_cpu")
def test_calculators_of_one_process_keep_their_own() -> None:
    model = ESCN(cutoff=3.0, lmax=1, mmax=1, num_layers=1, sphere_channels=16, hidden_channels=16,
                 edge_channels=16, num_radial=4, avg_num_neighbors=12.0)  # fmt: skip
    scatter_weights(model)
    potential = Potential(model).requires_grad_(False).eval()
    atoms = Atoms("CuAl", [[0.0, 0.0, 0.0], [1.5, 1.2, 0.9]])

    def forces(*calculators: AtomeqCalculator) -> list[torch.Tensor]:
        return [torch.as_tensor(one.get_forces(atoms.copy())) for one in calculators]

    fine = AtomeqCalculator(potential, precision="highest")
    coarse = AtomeqCalculator(potential, precision="medium")
    both = forces(fine, coarse)
    before = torch.get_float32_matmul_precision()
    alone = forces(AtomeqCalculator(potential))[0]
    assert torch.equal(both[0], alone)
    assert relative(both[1], alone) > SINGLE
    assert torch.get_float32_matmul_precision() == before
    assert potential.precision is None
    assert coarse.parameters["precision"] == "medium"


@pytest.mark.triton
def test_a_choice_remembered_at_one_precision_is_none_at_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("atomeq.ops.edge.triton.kernels", reason="Triton is not installed")
    proved = []

    def proof(name: str, precision: str, *rest: object) -> str | None:
        proved.append(precision)
        return "its self-check failed" if precision == "medium" else None

    monkeypatch.setattr(dispatch, "AUTO_ORDER", ("triton", "reference"))
    monkeypatch.setitem(dispatch.PROVED, "triton", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(dispatch, "_proof", proof)
    size = dispatch.Size(1, 1, 16, 1, torch.float32, torch.device("cpu"))
    served = []
    for precision in ("high", "medium", "high"):
        with use_precision(precision):
            served.append(dispatch.serving("gaunt_product", size))
    assert served == ["triton", "reference", "triton"]
    assert proved == ["high", "medium"]


def test_a_folder_recommends_and_its_user_decides(tmp_path) -> None:
    potential = small_potential()
    potential.precision = "high"
    folder = save_potential(potential, tmp_path / "own")
    assert load_potential(folder).precision == "high"
    assert load_potential(folder, precision="highest").precision == "highest"
    assert frozen(potential, precision="medium").precision == "medium"
    assert potential.precision == frozen(potential).precision == "high"
    with pytest.raises(ValueError, match="precision must be highest, high, medium, not 'tf32'"):
        AtomeqCalculator(folder, precision="tf32")
    path = folder / "model.yaml"
    path.write_text(path.read_text().replace("precision: high", "precision: low"))
    with pytest.raises((CheckpointError, ValueError), match="not 'low'"):
        load_potential(folder)


def test_a_cpu_computes_in_single_precision_whatever_is_allowed() -> None:
    atoms, potential = bulk("Cu", cubic=True), small_potential()
    atoms.rattle(0.1, seed=0)
    forces = [
        AtomeqCalculator(potential, precision=precision).get_forces(atoms.copy())
        for precision in ("highest", "medium")
    ]
    assert (forces[0] == forces[1]).all()
