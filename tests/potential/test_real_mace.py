"""Files that mace-torch itself writes: converted by the command line, they give its numbers."""

import warnings

import numpy as np
import pytest
import torch
from ase.build import bulk

from atomeq.cli import main
from atomeq.potential.checkpoint import load_potential

mace = pytest.importorskip("mace.modules", reason="mace-torch 0.3.16 is not installed")

SAME = 1e-8  # eV, eV/Å and eV/Å³, both in float64
CUTOFF, ELEMENTS = 4.0, (8, 12)
RESIDUAL = "RealAgnosticResidualInteractionBlock"
NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
FORMS = {
    "as MACE-MP-0": {},
    "as MPA-0": {
        "first": "RealAgnosticDensityInteractionBlock",
        "other": "RealAgnosticDensityResidualInteractionBlock",
        "distance_transform": "Agnesi",
        "pair_repulsion": True,
    },
    "agnostic": {"first": "RealAgnosticInteractionBlock", "correlation": 2},
    "soft distances": {"distance_transform": "Soft"},
    "one layer": {"num_interactions": 1},
    "heads": {
        "heads": ["a", "b"],
        "atomic_energies": np.array([[-1.5, -2.25], [-1.0, -2.0]]),
        "atomic_inter_scale": [0.8, 1.1],
        "atomic_inter_shift": [0.1, 0.2],
    },
    "as OMOL-0": {
        "first": NONLINEAR,
        "other": NONLINEAR,
        "apply_cutoff": False,
        "edge_irreps": "4x0e+4x1o",
        "use_agnostic_product": True,
        "use_last_readout_only": True,
        "readout": "NonLinearBiasReadoutBlock",
    },
}


@pytest.fixture(autouse=True)
def their_dtype():
    """They compute in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an e3nn older than this torch
        yield
    torch.set_default_dtype(before)


def their_model(first=RESIDUAL, other=RESIDUAL, readout="NonLinearReadoutBlock", **options):
    from e3nn import o3
    from mace import modules

    torch.manual_seed(0)
    if "edge_irreps" in options:
        options["edge_irreps"] = o3.Irreps(options["edge_irreps"])
    usual = {
        "num_interactions": 2,
        "correlation": 3,
        "atomic_energies": np.array([-1.5, -2.25]),
        "atomic_inter_scale": 0.8,
        "atomic_inter_shift": 0.1,
    }
    return modules.ScaleShiftMACE(
        **{**usual, **options},
        r_max=CUTOFF,
        num_bessel=6,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=modules.interaction_classes[other],
        interaction_cls_first=modules.interaction_classes[first],
        num_elements=len(ELEMENTS),
        hidden_irreps=o3.Irreps("8x0e+8x1o"),
        MLP_irreps=o3.Irreps("4x0e"),
        avg_num_neighbors=11.3,
        atomic_numbers=list(ELEMENTS),
        gate=torch.nn.functional.silu,
        radial_MLP=[8, 8],
        radial_type="bessel",
        readout_cls=getattr(modules, readout),
    )


def their_results(model, atoms, heads, head):
    from mace import data, tools

    configuration = data.config_from_atoms(atoms)
    configuration.head = head or "Default"
    table = tools.AtomicNumberTable(list(ELEMENTS))
    entry = data.AtomicData.from_config(configuration, z_table=table, cutoff=CUTOFF, heads=heads)
    loader = tools.torch_geometric.dataloader.DataLoader([entry], batch_size=1)
    return model(next(iter(loader)).to_dict(), compute_force=True, compute_stress=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_mace_torch_gives_its_numbers(form, tmp_path):
    model = their_model(**FORMS[form])
    torch.save(model, tmp_path / "their.model")
    heads = FORMS[form].get("heads")
    head = heads[-1] if heads else None
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.rattle(0.1, seed=1)
    expected = their_results(model, atoms, heads, head)

    torch.set_default_dtype(torch.float32)  # as it is where files are converted
    choice = ["--head", head] if head else []
    main(["convert", str(tmp_path / "their.model"), str(tmp_path / "ours"), *choice])
    potential = load_potential(tmp_path / "ours")
    found = potential(potential.build_graph(atoms), ("energy", "forces", "stress"))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=SAME, msg=key)
