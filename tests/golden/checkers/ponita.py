"""Golden checks of PONITA in its published modes."""

from typing import Any

import torch
from torch import Tensor

from atomeq.models.ponita_published import PositionOrientationNetwork
from atomeq.ops.segment.operations import segment_sum
from checkers.cases import Case, FileCase, Tensors, compare_all, gradients, probe_loss
from checkers.report import Report
from checkers.taps import Taps


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.family == "ponita"


def check(case: FileCase, report: Report) -> None:
    """Check a case in float64 and float32."""
    for dtype in case.tolerances:
        network = build(case.config)
        weights = case.weights(torch.float32)
        if network.num_ori > 0:
            weights["ori_grid"] = case.inputs(torch.float32)["ori_grid"]
        buffers = ("callibrated", "windowing_fn.p", "windowing_fn.r_max")
        network.load_state_dict({k: v for k, v in weights.items() if not k.endswith(buffers)})
        network = network.to(dtype).eval()
        inputs = case.inputs(dtype)
        of = {f"grad.in.{k}": inputs[k].requires_grad_() for k in ("pos", "vec") if k in inputs}
        of |= {f"gradparam.{name}": p for name, p in network.named_parameters()}
        found = run(network, inputs, by_atom=case.config["task_level"] == "node")
        loss = probe_loss([found[k] for k in case.document["outputs"] if k in found])
        expected = case.expected(dtype)
        found |= gradients(loss, {k: v for k, v in of.items() if k in expected})
        found["out.probe_loss"] = loss
        shaped = {k: v.reshape(expected[k].shape) for k, v in found.items() if k in expected}
        compare_all(case, report, shaped, dtype)


def build(config: dict[str, Any]) -> PositionOrientationNetwork:
    """Build the network of a case."""
    if not config["lift_graph"]:
        raise ValueError("graphs that are lifted before the network are not supported")
    return PositionOrientationNetwork(
        config["input_dim"],
        config["output_dim"],
        config["output_dim_vec"],
        hidden_channels=config["hidden_dim"],
        basis_channels=config["basis_dim"] or config["hidden_dim"],
        num_layers=config["num_layers"],
        num_ori=config["num_ori"],
        degree=config["degree"],
        widening=config["widening_factor"],
        layer_scale=config["layer_scale"],
        radius=config["radius"],
        multiple_readouts=config["multiple_readouts"],
    )


def run(network: PositionOrientationNetwork, inputs: Tensors, *, by_atom: bool) -> Tensors:
    """Return outputs and intermediates by the names of the case."""
    pos, batch = inputs["pos"], inputs["batch"]
    space = network.space(pos, inputs["edge_index"], batch)
    found: dict[str, Tensor] = {"mid.attr": space.invariants, "mid.edge_index": space.edge_index}
    found["mid.scatter_projection_index"] = space.atom
    if network.num_ori > 0:
        found["mid.fiber_attr"] = network.ori_grid @ network.ori_grid.T
    taps = Taps()
    for k, layer in enumerate(network.interaction_layers):
        taps.keep(layer.get_submodule("conv"), f"layer{k}.conv")
        taps.keep(layer, f"layer{k}.x")
    with taps:
        scalars, vectors = network(
            inputs["x"], pos, inputs["edge_index"], batch=batch, vectors=inputs.get("vec")
        )
    n_graphs = int(batch.max()) + 1
    found["out.scalar"] = scalars if by_atom else segment_sum(scalars, batch, n_graphs)
    if vectors is not None:
        found["out.vector"] = vectors
    return found | taps.found
