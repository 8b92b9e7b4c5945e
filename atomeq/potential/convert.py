"""Published checkpoints become potential folders, whatever code wrote them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from atomeq.models.mace import MACE
from atomeq.potential.checkpoint import save_potential, sha256
from atomeq.potential.distances import SHORTEST
from atomeq.potential.import_mace import is_module_file, mace_card
from atomeq.potential.import_official import CARD_FILE, OfficialError, load_document
from atomeq.potential.import_official import convert_checkpoint as convert_official
from atomeq.potential.import_sevennet import convert_sevennet, is_sevennet, sevennet_card
from atomeq.potential.mace_state import convert_mace, convert_mace_state, is_mace_state
from atomeq.potential.potential import Potential
from atomeq.potential.repulsion import ZBL


def convert_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    use_ema: bool = False,
    grid_resolution: int | None = None,
    modal: str | None = None,
    head: str | None = None,
    config: Path | None = None,
    zbl: bool = False,
) -> Path:
    """Write the potential folder of a published checkpoint, with a model card.

    Args:
        checkpoint: A .pt file of fairchem 1.x (eSCN, EquiformerV2, eSEN) or of EquiformerV3, a .pth
            file of SevenNet, or a .model file or a state dict of MACE.
        folder: Created if missing; its name is that of the potential.
        use_ema: Take the running average of the weights, of fairchem's files.
        grid_resolution: Replace that of fairchem's models.
        modal: Modality of a SevenNet of several.
        head: Head of a MACE of several.
        config: What a state dict of MACE does not say, see mace_state.py.
        zbl: Add the repulsion of nuclei where atoms are closer than in the data; not in MACE files
            that have their own. Numbers of ordinary structures stay.

    Returns:
        The folder.

    Raises:
        OfficialError: The file cannot be read without running code, says something unknown, or an
            option is given that its kind has not.
    """
    path, folder = Path(checkpoint), Path(folder)
    module = is_module_file(path)
    document = {} if module else load_document(path)
    state = is_mace_state(document)
    if config is not None and not state:
        raise OfficialError(f"{path} is no state dict of MACE; leave out --config {config}")
    if module or state:
        if use_ema or grid_resolution is not None or modal is not None:
            raise OfficialError(f"{path} is of MACE, which has no EMA weights, grids or modalities")
        digest = sha256(path)
        if module:
            potential, origin = convert_mace(path, digest, head=head)
        else:
            potential, origin = convert_mace_state(document, path, digest, config, head=head)
        return _write(potential, folder, origin, mace_card, zbl=zbl)
    if head is not None:
        raise OfficialError(f"{path} has no heads to choose; leave out --head {head}")
    if not is_sevennet(document):
        if modal is not None or zbl:
            lacks = "takes no repulsion; leave out --zbl" if zbl else f"has no modality {modal!r}"
            raise OfficialError(f"{path} is of fairchem and {lacks}")
        return convert_official(path, folder, use_ema=use_ema, grid_resolution=grid_resolution)
    if use_ema or grid_resolution is not None:
        raise OfficialError(f"{path} is of SevenNet, which has neither EMA weights nor grids")
    potential, origin = convert_sevennet(document, path, sha256(path), modal=modal)
    return _write(potential, folder, origin, sevennet_card, zbl=zbl)


def _write(
    potential: Potential,
    folder: Path,
    origin: dict[str, Any],
    card: Callable[[str, dict[str, Any], Potential], str],
    *,
    zbl: bool,
) -> Path:
    if zbl and isinstance(potential.model, MACE) and potential.model.form.repulsion:
        raise OfficialError(f"{origin['file']} has a ZBL repulsion of its own; leave out --zbl")
    if zbl:
        potential.add_terms([ZBL(SHORTEST)])
    save_potential(potential, folder, metadata={"origin": origin})
    text = card(folder.name, origin, potential)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    return folder
