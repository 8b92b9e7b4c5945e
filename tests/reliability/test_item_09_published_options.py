"""Published SEGNO and EquiHGNN with the options that no recorded case has, and how frames compare.

Cases are made here, by loops over particles in float64 that share nothing with the models, and go
through the golden checkers as recorded ones do.
"""

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from published.equihgnn import PublishedEquiHGNN
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from atomeq.nn.hypergraph import HypergraphMLP
from checkers.cases import Case
from checkers.faenet import in_their_order
from checkers.registry import main

RECORDED = Path(__file__).parents[1] / "golden" / "light_models"
EXACT = 1e-9  # float64, the order of sums
HIDDEN = 8
Weights = dict[str, Tensor]


def network(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Two linear layers with SiLU between them."""
    for number in (0, 2):
        x = weights[f"{name}.{number}.weight"] @ x
        x = x + weights.get(f"{name}.{number}.bias", torch.zeros_like(x))
        x = silu(x) if number == 0 else x
    return x


def turned(spin: Tensor, arm: Tensor) -> Tensor:
    x, y, z = spin.tolist()
    return torch.linalg.matrix_exp(spin.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])) @ arm


def forces(w: Weights, config: dict[str, Any], state: tuple, edges: Tensor, attributes: Tensor):
    """Return the mean pull on each particle and the features after the step."""
    h, x = state
    motion = "module.f_hinge_mlp.0.weight" in w
    pulls, sums = torch.zeros_like(x), torch.zeros_like(h)
    for i in range(len(x)):
        mine = [e for e in range(edges.shape[1]) if edges[0, e] == i]
        for e in mine:
            j = int(edges[1, e])
            away = x[i] - x[j]
            squared = (away @ away).reshape(1)
            m = silu(network(w, "module.edge_mlp", torch.cat([h[i], h[j], squared, attributes[e]])))
            if config["norm_diff"] and config["model"] != "segno_nbody":  # ignored there
                away = away / (squared.sqrt() + 1)
            strength = network(w, "module.coord_mlp", m)
            strength = strength.tanh() if config["tanh"] else strength
            pulls[i] += (away * strength).clamp(-100, 100) / len(mine)
            sums[i] += m
    pulls = pulls * config.get("coords_weight", 1.0)
    new = torch.stack([
        network(w, "module.node_mlp", torch.cat([*([h[i]] * (1 + motion)), sums[i]]))
        for i in range(len(x))
    ])  # fmt: skip
    return pulls, h + new if config["recurrent"] else new


def free_step(w: Weights, config: dict[str, Any], state: tuple, force: Tensor):
    h, x, v = state
    if config["model"] == "segno_nbody":
        v = v + force / 8
        return x + v / 8, v
    gate = torch.stack([network(w, "module.coord_mlp_vel", a) for a in h])
    v = gate * v + force
    return x + v, v


def acceleration(w: Weights, name: str, basis: list[Tensor]) -> Tensor:
    gram = torch.stack([a @ b for a in basis for b in basis])
    factors = network(w, f"module.{name}", gram / gram.norm().clamp(min=1e-12))
    return sum((f * a for f, a in zip(factors, basis, strict=True)), torch.zeros(3).double())


def rigid_step(w: Weights, bodies: dict[str, Tensor], state: tuple, force: Tensor):
    """Move free particles, sticks and hinges of the motion form by one step."""
    h, x, v = state
    new_x, new_v = x + v + force, v + force
    cross = torch.linalg.cross
    for a, b in bodies.get("Stick", torch.zeros(0, 2)).tolist():
        arm, swing = (x[a] - x[b]) / 2, (v[a] - v[b]) / 2
        pull = sum(acceleration(w, "f_stick_mlp", [force[k]]) for k in (a, b)) / 2
        inertia = 2 * arm @ arm
        spin = cross(arm, swing) / (arm @ arm)
        spin = spin + (cross(arm, force[a]) - cross(arm, force[b])) / inertia
        centre_v = (v[a] + v[b]) / 2 + pull
        centre, arm = (x[a] + x[b]) / 2 + centre_v, turned(spin, arm)
        for k, sign in ((a, 1), (b, -1)):
            new_x[k], new_v[k] = centre + sign * arm, centre_v + cross(spin, sign * arm)
    for pivot, *ends in bodies.get("Hinge", torch.zeros(0, 3)).tolist():
        pull = sum(
            acceleration(w, "f_hinge_mlp", [force[k], x[k] - x[pivot], v[k] - v[pivot]])
            for k in (pivot, *ends)
        ) / 3  # fmt: skip
        new_v[pivot] = v[pivot] + pull
        new_x[pivot] = x[pivot] + new_v[pivot]
        for k in ends:
            arm = x[k] - x[pivot]
            spin = cross(arm, v[k] - v[pivot]) / (arm @ arm)
            spin = network(w, "module.coord_mlp_w_vel", h[k]) * spin  # of the features of before
            spin = spin + cross(arm, force[k] - pull) / (arm @ arm)
            arm = turned(spin, arm)
            new_x[k], new_v[k] = new_x[pivot] + arm, new_v[pivot] + cross(spin, arm)
    return new_x, new_v


def attributes_of(model: str, given: Weights) -> tuple[Tensor, Tensor]:
    """Return the features of particles and edges as the reference's mains make them."""
    x, v, (row, col) = given["x"], given["v"], given["edge_index"].tolist()
    pairs = list(zip(row, col, strict=True))
    squared = [float((x[i] - x[j]) @ (x[i] - x[j])) for i, j in pairs]
    speed = v.norm(dim=1, keepdim=True)
    if model == "segno_nbody":
        q = given["charges"][:, 0].tolist()
        edges = [[q[i] * q[j], d] for (i, j), d in zip(pairs, squared, strict=True)]
        return speed, x.new_tensor(edges)
    z = given["z"].to(x.dtype)
    nodes = torch.cat([speed, z[:, None] / z.max()], dim=1)
    if model == "segno_md22":
        edges = [
            [float(z[i]), float(z[j]), 1.0, 0.0, d]
            for (i, j), d in zip(pairs, squared, strict=True)
        ]
        return nodes, x.new_tensor(edges)
    return nodes, torch.cat([given["edge_attr0"], x.new_tensor(squared)[:, None]], dim=1)


def naive(config: dict[str, Any], w: Weights, given: Weights) -> Weights:
    """Return the outputs of a form of SEGNO."""
    nodes, edges = attributes_of(config["model"], given)
    h = torch.stack([w["embedding.weight"] @ n + w["embedding.bias"] for n in nodes])
    x, v = given["x"], given["v"]
    bodies = {k.removeprefix("cfg_"): t for k, t in given.items() if k.startswith("cfg_")}
    for _ in range(config["n_layers"]):
        force, after = forces(w, config, (h, x), given["edge_index"], edges)
        if config["model"] == "segno_motion":
            x, v = rigid_step(w, bodies, (h, x, v), force)
        else:
            x, v = free_step(w, config, (h, x, v), force)
        h = after
    found = {"out.x": x, "out.h": h, "out.v": v}
    return {k: t for k, t in found.items() if k in OUTPUTS[config["model"]]}


OUTPUTS = {
    "segno_nbody": ("out.x", "out.h", "out.v"),
    "segno_md22": ("out.x", "out.v"),
    "segno_motion": ("out.x", "out.v"),
}
N_FEATURES = {"segno_nbody": (1, 2), "segno_md22": (2, 5), "segno_motion": (2, 3)}


def made_weights(model: str, seed: int) -> Weights:
    """Return weights of the reference's names and shapes, large enough for options to matter."""
    random = torch.Generator().manual_seed(seed)
    n_nodes, n_edges = N_FEATURES[model]
    motion = model == "segno_motion"
    shapes = {
        "module.edge_mlp": (2 * HIDDEN + 1 + n_edges, HIDDEN, HIDDEN),
        "module.node_mlp": ((3 if motion else 2) * HIDDEN, HIDDEN, HIDDEN),
        "module.coord_mlp": (HIDDEN, HIDDEN, 1),
        "module.coord_mlp_vel": (HIDDEN, HIDDEN, 1),
    }
    if motion:
        shapes |= {
            "module.coord_mlp_w_vel": (HIDDEN, HIDDEN, 1),
            "module.f_stick_mlp": (1, HIDDEN, 1),
            "module.f_hinge_mlp": (9, HIDDEN, 3),
        }
    found = {"embedding.weight": (HIDDEN, n_nodes), "embedding.bias": (HIDDEN,)}
    for name, widths in shapes.items():
        for number, (n_in, n_out) in zip((0, 2), pairwise(widths), strict=True):
            found[f"{name}.{number}.weight"] = (n_out, n_in)
            if name != "module.coord_mlp" or number == 0 or model == "segno_nbody":
                found[f"{name}.{number}.bias"] = (n_out,)
    return {name: torch.randn(shape, generator=random) * 0.5 for name, shape in found.items()}


def made_inputs(model: str, seed: int) -> Weights:
    random = torch.Generator().manual_seed(100 + seed)
    n = 8
    edge_index = torch.tensor([(i, j) for i, j in product(range(n), range(n)) if i != j]).T
    given = {
        "x": torch.randn(n, 3, generator=random),
        "v": 0.3 * torch.randn(n, 3, generator=random),
        "edge_index": edge_index[:, torch.randperm(n * n - n, generator=random)[:40]].contiguous(),
    }
    if model == "segno_nbody":
        given["charges"] = torch.randint(0, 2, (n, 1), generator=random) * 2.0 - 1
    else:
        given["z"] = torch.randint(1, 9, (n,), generator=random)
    if model == "segno_motion":
        given["edge_attr0"] = torch.randn(edge_index.shape[1], 2, generator=random)[:40].clone()
        given["cfg_Isolated"] = torch.tensor([3])
        given["cfg_Stick"] = torch.tensor([[0, 5]])
        given["cfg_Hinge"] = torch.tensor([[6, 1, 2], [4, 0, 7]][:1])
        given["cfg_Isolated"] = torch.tensor([3, 4, 7])
    return given


def case_of(folder: Path, model: str, seed: int, **options: Any) -> Path:
    """Write a case in the layout of the golden files and return its folder."""
    n_nodes, n_edges = N_FEATURES[model]
    config = {"in_node_nf": n_nodes, "in_edge_nf": n_edges, "hidden_nf": HIDDEN, "n_layers": 3}
    config |= {"recurrent": True, "norm_diff": False, "tanh": False} | options
    weights, given = made_weights(model, seed), made_inputs(model, seed)
    double = {k: t.double() if t.is_floating_point() else t for k, t in given.items()}
    outputs = naive(config | {"model": model}, {k: t.double() for k, t in weights.items()}, double)
    tensors = {f"param.{k}": t for k, t in weights.items()} | {
        f"in.{k}": t for k, t in given.items()
    }
    tensors |= {f"{k}.f64": t for k, t in outputs.items()}
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "case0.safetensors")
    document = {"model": model, "config": config, "outputs": list(outputs)}
    (folder / "case0.json").write_text(json.dumps(document))
    return folder


OPTIONS = {
    "tanh": {"tanh": True},
    "not recurrent": {"recurrent": False},
    "norm_diff": {"norm_diff": True},
    "coords_weight": {"coords_weight": 0.3},
    "all": {"tanh": True, "recurrent": False, "norm_diff": True, "coords_weight": 2.0},
    "none": {},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", OUTPUTS)
def test_published_segno_takes_its_options(model: str, options: str, tmp_path: Path) -> None:
    case_of(tmp_path, model, 7, **OPTIONS[options])
    assert main([str(tmp_path)]) == 0


@pytest.mark.parametrize("model", OUTPUTS)
def test_options_matter_so_that_one_that_is_ignored_is_found(model: str, tmp_path: Path) -> None:
    wrong = case_of(tmp_path, model, 7, tanh=True, recurrent=False)
    path = wrong / "case0.json"
    document = json.loads(path.read_text())
    for name, value in (("tanh", False), ("recurrent", True)):
        changed = document | {"config": document["config"] | {name: value}}
        path.write_text(json.dumps(changed))
        assert main([str(tmp_path)]) == 1


@pytest.mark.parametrize("name", sorted(p.parent.name for p in RECORDED.rglob("segno_*/*.json")))
def test_the_loops_are_the_reference(name: str) -> None:
    """What the cases above are made by gives what the reference gave."""
    for path in sorted((RECORDED / name).glob("*.json")):
        case = Case.read(path)
        weights, given = case.weights(torch.float64), case.inputs(torch.float64)
        wanted = case.expected(torch.float64)
        found = naive(case.config | {"model": case.model}, weights, given)
        for output in found.keys() & wanted.keys():
            largest = float(wanted[output].abs().max())
            assert float((found[output] - wanted[output]).abs().max()) <= EXACT * largest


def test_normalization_none_by_the_references_word() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    for word in ("None", "none", "ln"):
        mlp = HypergraphMLP(3, 4, 2, num_layers=3, normalization=word).double()
        expected = x
        for number, linear in enumerate(mlp.lins):
            expected = expected @ linear.weight.T + linear.bias
            expected = expected.clamp(min=0) if number < 2 else expected
            if word == "ln" and number < 2:
                expected = layer_norm(expected, (4,))
        assert float((mlp(x) - expected).detach().abs().max()) <= EXACT
    for variant in ("mhnn", "mhnns", "mhnnm"):
        bare = PublishedEquiHGNN(variant, channels=4, output_channels=4, normalization="None")
        assert not [name for name in bare.state_dict() if "normalizations" in name]
    with pytest.raises(ValueError, match="'batch' is unknown"):
        HypergraphMLP(3, 4, 2, normalization="batch")  # pyright: ignore[reportArgumentType]


def test_frames_compare_as_a_set_up_to_the_signs_of_their_columns() -> None:
    torch.manual_seed(1)
    frames = torch.linalg.qr(torch.randn(4, 2, 3, 3, dtype=torch.float64))[0]
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    theirs = (frames * signs)[[2, 0, 3, 1]]
    assert torch.equal(in_their_order(frames, theirs), theirs)
    other = frames.clone()
    other[0] = other[1]
    assert not torch.allclose(in_their_order(other, theirs), theirs)
