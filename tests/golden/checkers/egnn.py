"""Golden checks of EGNN and SEGNO in their published forms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from published.egnn import GenericEGNN, from_official
from published.segno_motion import SEGNOMotion
from published.segno_motion import from_official as motion_names
from torch import Tensor, nn

from atomeq.models import egnn_published, segno
from atomeq.models.segno import Motion
from checkers.cases import Case, FileCase, Tensors, compare_all, gradients, probe_loss
from checkers.report import Report


@dataclass(frozen=True)
class Variant:
    """How to build a variant from its config, name its weights and run it.

    Attributes:
        build: Makes the model.
        rename: From the reference's state_dict to ours.
        run: Model and inputs to ``out.*`` and ``mid.*``.
    """

    build: Callable[[dict[str, Any]], Any]
    rename: Callable[[Tensors, Any], Tensors]
    run: Callable[[Any, Tensors], Tensors]


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.family in ("egnn", "segno")


def check(case: FileCase, report: Report) -> None:
    """Check a case in float64 and float32."""
    if case.model not in VARIANTS:
        report.fail(f"no variant {case.model!r}; there are {', '.join(VARIANTS)}")
        return
    variant = VARIANTS[case.model]
    for dtype in case.tolerances:
        model = variant.build(case.config).to(dtype).eval()
        model.load_state_dict(variant.rename(case.weights(dtype), model))
        inputs, wanted = case.inputs(dtype), case.expected(dtype)
        sought = [name for name in wanted if name.startswith("grad.in.")]
        differentiated = {
            name: inputs[name.removeprefix("grad.in.")].requires_grad_() for name in sought
        }
        found = variant.run(model, inputs)
        target = inputs.get("x_target")
        names = [name for name in case.document["outputs"] if name in found]
        if target is not None:
            found["out.mse"] = probe_loss([found["out.x"]], target=target)
        # The MSE is the probe where it is an output; a target may also just lie there.
        target = target if "out.mse" in wanted else None
        loss = probe_loss([found[name] for name in names], target=target)
        found["out.probe_loss"] = loss
        found |= gradients(loss, differentiated) if differentiated else {}
        weights = {f"gradparam.{n}": w for n, w in official_parameters(case, variant, model)}
        found |= gradients(loss, weights) if any(n in wanted for n in weights) else {}
        compare_all(case, report, found, dtype)


def official_parameters(
    case: FileCase, variant: Variant, model: nn.Module
) -> list[tuple[str, Tensor]]:
    """Return our parameters under the reference's names, found by renaming one name at a time."""
    ours = dict(model.named_parameters())
    pairs = []
    for name, weight in case.weights(torch.float64).items():
        renamed = variant.rename({name: weight}, model)
        pairs += [(name, ours[key]) for key in renamed]
    return pairs


def flipped(inputs: Tensors) -> Tensor:
    """Return the edges in the house's order: the reference has the receiver in row 0."""
    return inputs["edge_index"].flip(0)


def record_layers(layers: nn.ModuleList, found: Tensors) -> None:
    """Keep what every layer returns as the reference's intermediates."""
    for index, layer in enumerate(layers):

        def keep(_module: nn.Module, _inputs: Any, output: Any, index: int = index) -> None:
            found[f"mid.gcl_{index}.h"], found[f"mid.gcl_{index}.x"] = output

        layer.register_forward_hook(keep)


def build_generic(config: dict[str, Any]) -> nn.Module:
    return GenericEGNN(
        config["in_node_nf"],
        config["out_node_nf"],
        hidden_channels=config["hidden_nf"],
        n_edge_features=config["in_edge_nf"],
        num_layers=config["n_layers"],
        residual=config["residual"],
        attention=config["attention"],
        normalize=config["normalize"],
        tanh=config["tanh"],
    )


def run_generic(model: Any, inputs: Tensors) -> Tensors:
    found: Tensors = {}
    record_layers(model.layers, found)
    h, x = model(inputs["h"], inputs["x"], flipped(inputs), inputs.get("edge_attr"))
    return found | {"out.h": h, "out.x": x}


def build_velocity(config: dict[str, Any]) -> nn.Module:
    return egnn_published.VelocityEGNN(
        config["in_node_nf"],
        config["in_edge_nf"],
        hidden_channels=config["hidden_nf"],
        num_layers=config["n_layers"],
        pull_scale=config["coords_weight"],
        residual=config["recurrent"],
        normalize=config["norm_diff"],
        tanh=config["tanh"],
    )


def nbody_features(inputs: Tensors, velocities: Tensor) -> tuple[Tensor, Tensor]:
    """Return |v| and [q_i q_j, d_ij²], which the reference computes once and detaches."""
    row, col = inputs["edge_index"]
    x = inputs["x"].detach()
    squared = ((x[row] - x[col]) ** 2).sum(dim=1, keepdim=True)
    speed = velocities.detach().norm(dim=1, keepdim=True)
    if "charges" not in inputs:  # gravity: distances alone
        return speed, squared
    charges = inputs["charges"]
    return speed, torch.cat([charges[row] * charges[col], squared], dim=1)


def run_velocity(model: Any, inputs: Tensors) -> Tensors:
    found: Tensors = {}
    record_layers(model.layers, found)
    features = nbody_features(inputs, inputs["vel"])
    x, _ = model(inputs["x"], inputs["vel"], *features, flipped(inputs))
    return found | {"out.x": x}


def build_qm9(config: dict[str, Any]) -> nn.Module:
    return egnn_published.MoleculeEGNN(
        hidden_channels=config["hidden_nf"],
        num_layers=config["n_layers"],
        attention=bool(config["attention"]),
        repeat_inputs=bool(config["node_attr"]),
    )


def run_qm9(model: Any, inputs: Tensors) -> Tensors:
    """Run on flattened molecules; padded atoms have no edges and belong to one more molecule."""
    found: Tensors = {}
    record_layers(model.layers, found)
    n_graphs, n_max = inputs["z"].shape
    real = inputs["atom_mask"].flatten() > 0
    pairs = inputs["edge_mask"].view(n_graphs, n_max, n_max).nonzero()
    first = pairs[:, 0] * n_max
    edge_index = torch.stack([first + pairs[:, 2], first + pairs[:, 1]])
    batch = torch.arange(n_graphs).repeat_interleave(n_max).where(real, n_graphs)
    z, pos = inputs["z"].flatten(), inputs["pos"].view(-1, 3)
    prediction = model.predict(z, pos, edge_index, batch, n_graphs + 1)[:n_graphs]
    features = model.input_features(z).to(pos.dtype)
    return found | {"mid.h0": features, "out.pred": prediction}


def build_segno_nbody(config: dict[str, Any]) -> nn.Module:
    return segno.nbody_form(
        config["n_layers"],
        n_inputs=config["in_node_nf"],
        n_edge_features=config["in_edge_nf"],
        hidden_channels=config["hidden_nf"],
        **segno_options(config),
    )


def segno_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return what all three forms of SEGNO have in common."""
    return {
        "residual": config["recurrent"],
        "tanh": config["tanh"],
        "pull_scale": config.get("coords_weight", 1.0),
    }


def run_segno(model: Any, inputs: Tensors, features: tuple[Tensor, Tensor]) -> Tensors:
    found: Tensors = {}
    node_features, edge_features = features
    motion = Motion(model.embedding(node_features), inputs["x"], inputs["v"])
    for index, motion in enumerate(model.trajectory(motion, edge_features, flipped(inputs))):  # noqa: B020
        for name, value in zip("hxv", motion, strict=True):
            found[f"mid.it{index}.{name}"] = value
    return found | {"out.x": motion.pos, "out.v": motion.velocities, "out.h": motion.h}


def build_segno_md22(config: dict[str, Any]) -> nn.Module:
    return segno.md22_form(
        config["n_layers"],
        n_inputs=config["in_node_nf"],
        n_edge_features=config["in_edge_nf"],
        hidden_channels=config["hidden_nf"],
        normalize=config["norm_diff"],
        **segno_options(config),
    )


def md22_features(inputs: Tensors) -> tuple[Tensor, Tensor]:
    """Return [|v|, Z/Zmax] and [Z_i, Z_j, 1, 0, d_ij²]."""
    row, col = inputs["edge_index"]
    x, v = inputs["x"].detach(), inputs["v"].detach()
    z = inputs["z"].to(x.dtype)[:, None]
    squared = ((x[row] - x[col]) ** 2).sum(dim=1, keepdim=True)
    ones = torch.ones_like(squared)
    nodes = torch.cat([v.norm(dim=1, keepdim=True), z / z.max()], dim=1)
    return nodes, torch.cat([z[row], z[col], ones, 0 * ones, squared], dim=1)


def build_segno_motion(config: dict[str, Any]) -> nn.Module:
    if config.get("learnable"):
        raise ValueError("learnable sticks raise a NameError in the reference")
    return SEGNOMotion(
        config["in_node_nf"],
        config["in_edge_nf"],
        hidden_channels=config["hidden_nf"],
        num_steps=config["n_layers"],
        normalize=config["norm_diff"],
        **segno_options(config),
    )


def run_segno_motion(model: Any, inputs: Tensors) -> Tensors:
    """Run with node features [|v|, Z/Zmax] and edge features [given, d_ij²]."""
    row, col = inputs["edge_index"]
    squared = ((inputs["x"][row] - inputs["x"][col]) ** 2).sum(dim=1, keepdim=True)
    edges = torch.cat([inputs["edge_attr0"], squared], dim=1)
    nodes, _ = md22_features(inputs)
    sticks = inputs.get("cfg_Stick", torch.zeros(0, 2, dtype=torch.long))
    hinges = inputs.get("cfg_Hinge")
    x, v = model(inputs["x"], inputs["v"], nodes, edges, flipped(inputs), sticks, hinges)
    return {"out.x": x, "out.v": v}


def egnn_names(weights: Tensors, _model: nn.Module) -> Tensors:
    return from_official(weights)


VARIANTS = {
    "egnn_clean": Variant(build_generic, egnn_names, run_generic),
    "egnn_vel": Variant(build_velocity, egnn_names, run_velocity),
    "egnn_qm9": Variant(build_qm9, egnn_names, run_qm9),
    "segno_nbody": Variant(
        build_segno_nbody,
        segno.from_official,
        lambda model, inputs: run_segno(model, inputs, nbody_features(inputs, inputs["v"])),
    ),
    "segno_motion": Variant(
        build_segno_motion,
        lambda weights, _model: motion_names(weights),
        run_segno_motion,
    ),
    "segno_md22": Variant(
        build_segno_md22,
        segno.from_official,
        lambda model, inputs: run_segno(model, inputs, md22_features(inputs)),
    ),
}
