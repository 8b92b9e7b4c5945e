"""Published checkpoints become potential folders, whatever code wrote them."""

from pathlib import Path
from typing import Any

from atomeq.potential.checkpoint import save_potential, sha256
from atomeq.potential.import_mace import convert_mace, is_module_file, mace_card
from atomeq.potential.import_official import CARD_FILE, OfficialError, load_document
from atomeq.potential.import_official import convert_checkpoint as convert_official
from atomeq.potential.import_sevennet import convert_sevennet, is_sevennet, sevennet_card
from atomeq.potential.mace_state import convert_mace_state, is_mace_state
from atomeq.potential.potential import Potential


def convert_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    use_ema: bool = False,
    grid_resolution: int | None = None,
    modal: str | None = None,
    head: str | None = None,
    config: Path | None = None,
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
        return _write(potential, folder, origin, mace_card(folder.name, origin, potential))
    if head is not None:
        raise OfficialError(f"{path} has no heads to choose; leave out --head {head}")
    if not is_sevennet(document):
        if modal is not None:
            raise OfficialError(f"{path} has no modalities; leave out --modal {modal}")
        return convert_official(path, folder, use_ema=use_ema, grid_resolution=grid_resolution)
    if use_ema or grid_resolution is not None:
        raise OfficialError(f"{path} is of SevenNet, which has neither EMA weights nor grids")
    potential, origin = convert_sevennet(document, path, sha256(path), modal=modal)
    return _write(potential, folder, origin, sevennet_card(folder.name, origin, potential))


def _write(potential: Potential, folder: Path, origin: dict[str, Any], card: str) -> Path:
    save_potential(potential, folder, metadata={"origin": origin})
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return folder
