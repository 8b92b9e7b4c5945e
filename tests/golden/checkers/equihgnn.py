"""Golden checks of MHNN, EquiHGNN and the hypergraphs they run on."""

from typing import Any

import torch
from published.equihgnn import Molecules, PublishedEquiHGNN
from torch import nn

from atomeq.graph.hyperedges import published_hypergraph, ring_features
from atomeq.graph.perception import import_chem
from checkers.cases import Case, FileCase, Tensors, compare_all, gradients, probe_loss
from checkers.report import Report


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.family == "equihgnn"


def check(case: FileCase, report: Report) -> None:
    """Check a case: the construction of hypergraphs, or a network in float64 and float32."""
    if case.model == "equihgnn_hypergraph":
        check_hypergraphs(case, report)
        return
    for dtype in case.tolerances:
        model = build(case.model, case.config).to(dtype).eval()
        model.load_state_dict(case.weights(dtype))
        inputs, wanted = case.inputs(dtype), case.expected(dtype)
        sought = [name for name in wanted if name.startswith("grad.in.")]
        differentiated = {name: inputs[name.removeprefix("grad.in.")] for name in sought}
        for tensor in differentiated.values():
            tensor.requires_grad_()
        found = run(model, inputs)
        loss = probe_loss([found["out.pred"]])
        found["out.probe_loss"] = loss
        weights = {f"gradparam.{name}": weight for name, weight in model.named_parameters()}
        found |= gradients(loss, differentiated | weights)
        compare_all(case, report, found, dtype)


def build(name: str, config: dict[str, Any]) -> PublishedEquiHGNN:
    """Build a variant, ``equihgnn_mhnns`` or ``equihgnn_egnn_equihnns``, from its config."""
    variant = name.removeprefix("equihgnn_").removeprefix("egnn_").replace("equihnn", "mhnn")
    depths = tuple(config[f"MLP{k}_num_layers"] for k in (1, 2, 3, 4))
    return PublishedEquiHGNN(
        variant,  # pyright: ignore[reportArgumentType]
        geometry="_egnn_" in name,
        num_target=config["num_target"],
        num_layers=config["All_num_layers"],
        channels=config["MLP_hidden"],
        output_channels=config["output_hidden"],
        output_layers=config["output_num_layers"],
        mlp_layers=depths,
        aggregate=config["aggregate"],
        normalization=config["normalization"],
        activation=config["activation"],
        dropout=config["dropout"],
    )


def run(model: PublishedEquiHGNN, inputs: Tensors) -> Tensors:
    """Return outputs and intermediates under their golden names."""
    found: Tensors = {}
    n_calls = 0

    def keep_convolution(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal n_calls
        x, e = output if isinstance(output, tuple) else (output, None)
        found[f"mid.conv{n_calls}.x"] = x
        if e is not None:
            found[f"mid.conv{n_calls}.e"] = e
        n_calls += 1

    def keep_encoding(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        found["mid.backbone_x"] = output[None]

    convolutions = model.layers if model.variant == "mhnnm" else [model.conv]
    hooks = [conv.register_forward_hook(keep_convolution) for conv in convolutions]
    if model.egnn_layer is not None:
        hooks.append(model.egnn_layer.register_forward_hook(keep_encoding))
    molecules = Molecules(
        x=inputs["x"],
        incidence=torch.stack([inputs["edge_index0"], inputs["edge_index1"]]),
        types=inputs["edge_attr"].reshape(-1),
        orders=inputs["e_order"],
        n_hyperedges=inputs["n_e"],
        batch=inputs["batch"],
        pos=inputs["pos"],
    )
    found["out.pred"] = model(molecules)
    for hook in hooks:
        hook.remove()
    return found


def check_hypergraphs(case: FileCase, report: Report) -> None:
    """Build every molecule's hypergraph and compare all its arrays, implicit and explicit H."""
    chem = import_chem()
    for wanted in case.document["molecules"]:
        smiles = wanted["smiles"]
        molecule = chem.MolFromSmiles(smiles)
        forms = {"implicitH": molecule, "explicitH": chem.AddHs(molecule)}
        for form, made in forms.items():
            arrays = published_hypergraph(made)
            for name, theirs in wanted[form].items():
                ours = torch.tensor(arrays[name]).double()
                label = f"{smiles} {form} {name}"
                report.compare(label, ours, torch.tensor(theirs).double(), torch.float64)
        rings = sorted([list(atoms), list(features)] for atoms, features in ring_features(molecule))
        if rings != sorted(wanted["rings"]):
            report.fail(f"{smiles}: rings {rings}, not {sorted(wanted['rings'])}")
