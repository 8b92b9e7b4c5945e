"""Published potentials that can be installed by name: where they are, and whose they are.

A potential lies inside a wheel of the Python package index. pip fetches that one file and nothing
is installed: the checkpoint is read from the archive, checked and converted, and no code of the
wheel runs.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from atomeq.potential.folders import CONFIG_FILE, user_root


class InstallError(ValueError):
    """A published potential cannot be had, or what came is not what it should be."""


@dataclass(frozen=True)
class PublishedPotential:
    """A checkpoint inside a wheel.

    Attributes:
        member: Its place in the wheel.
        sha256: Of the checkpoint.
        modalities: Of a potential of several, one of which has to be chosen.
        trained_on: Data, as its authors say.
        package: Name and version in the index.
        wheel_sha256: Of the wheel.
        licence: Of the wheel, as stated in it.
        authors: To be cited.
    """

    member: str
    sha256: str
    trained_on: str
    modalities: tuple[str, ...] = ()
    package: str = "sevenn==0.13.0"
    wheel_sha256: str = "9378f7df2b75fe83274483a5f804790ae1023dd22ddeb6a48c1a03de97e22620"
    licence: str = "MIT, Copyright (c) 2024 Yutack Park"
    authors: str = (
        "Y. Park, J. Kim, S. Hwang and S. Han, Scalable parallel algorithm for graph neural "
        "network interatomic potentials in molecular dynamics simulations, J. Chem. Theory "
        "Comput. 20, 4857 (2024)"
    )


_FOLDER = "sevenn/pretrained_potentials"
_MPTRJ = "MPtrj: relaxations of the Materials Project, PBE and PBE+U"

CATALOGUE: dict[str, PublishedPotential] = {
    "sevennet-0": PublishedPotential(
        f"{_FOLDER}/SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth",
        "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36",
        _MPTRJ,
    ),
    "sevennet-l3i5": PublishedPotential(
        f"{_FOLDER}/SevenNet_l3i5/checkpoint_l3i5.pth",
        "a7ff190d41efe5b8317a03d20a468e4036a1a3e64e0b14fdbab64ac3f4bfc09d",
        _MPTRJ,
    ),
    "sevennet-mf-0": PublishedPotential(
        f"{_FOLDER}/SevenNet_MF_0/checkpoint_sevennet_mf_0.pth",
        "81791329b37d445f46b531578c182c41792d98c7814222c9e5dde276402225fd",
        f"{_MPTRJ}, and r2SCAN labels of the same project",
        modalities=("PBE", "R2SCAN"),
    ),
    "sevennet-0-22may2024": PublishedPotential(
        f"{_FOLDER}/SevenNet_0__22May2024/checkpoint_sevennet_0.pth",
        "5d389fafd512e6ae2830d74d0b66ffc49a55d3832653ff8e7bf7f1343013c1d1",
        f"{_MPTRJ}; superseded by sevennet-0",
    ),
}


def install_potential(
    name: str,
    *,
    wheel: str | Path | None = None,
    modal: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Fetch, check and convert a published potential into the user's folder of potentials.

    Args:
        name: As in :data:`CATALOGUE`.
        wheel: The wheel on disk; by default pip downloads it.
        modal: Which modality, of a potential of several; it becomes part of the name.
        overwrite: Replace what is there.

    Returns:
        The folder, whose name :func:`~atomeq.potential.checkpoint.load_potential` knows.

    Raises:
        InstallError: No such potential or modality, no wheel, or one with other content.
        FileExistsError: It is installed already.
    """
    published = published_potential(name)
    folder = user_root() / installed_name(name, modal)
    if (folder / CONFIG_FILE).is_file() and not overwrite:
        raise FileExistsError(f"{folder} is installed already; --overwrite replaces it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".installing-") as scratch:
        source = Path(wheel) if wheel is not None else _download(published, Path(scratch))
        checkpoint = _checkpoint(published, source, Path(scratch))
        made = _converted(published, checkpoint, Path(scratch) / folder.name, modal)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        made.rename(folder)  # whole or not at all
    return folder


def published_potential(name: str) -> PublishedPotential:
    """Return what is known of a published potential.

    Raises:
        InstallError: There is none of this name.
    """
    if name not in CATALOGUE:
        raise InstallError(f"there is no published potential {name!r}: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def installed_name(name: str, modal: str | None) -> str:
    """Return the name of a potential once it is installed.

    Raises:
        InstallError: The modality does not exist or has to be chosen.
    """
    modalities = published_potential(name).modalities
    if modal is None and not modalities:
        return name
    if modal not in modalities:
        allowed = ", ".join(modalities) or "none"
        raise InstallError(f"{name} has the modalities {allowed}; --modal gave {modal!r}")
    return f"{name}-{modal.lower()}"


def _download(published: PublishedPotential, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch)]
    done = subprocess.run([*command, published.package], capture_output=True, text=True)
    found = sorted(scratch.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise InstallError(
            f"pip cannot download {published.package}: {reason}; where the package index is out of "
            "reach, fetch the wheel elsewhere and give it by --from FILE"
        )
    return found[0]


def _checkpoint(published: PublishedPotential, wheel: Path, scratch: Path) -> Path:
    """Return the checkpoint of a wheel, both checked."""
    if not wheel.is_file():
        raise InstallError(f"there is no wheel {wheel}")
    with wheel.open("rb") as stream:
        _check(hashlib.file_digest(stream, "sha256").hexdigest(), published.wheel_sha256, wheel)
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(published.member)
    _check(hashlib.sha256(content).hexdigest(), published.sha256, f"{published.member} in {wheel}")
    path = scratch / Path(published.member).name
    path.write_bytes(content)
    return path


def _check(found: str, expected: str, what: object) -> None:
    if found != expected:
        raise InstallError(
            f"{what} has SHA-256 {found[:16]}…, expected {expected[:16]}…: it is damaged or not "
            "the published one; nothing was installed"
        )


def _converted(
    published: PublishedPotential, checkpoint: Path, folder: Path, modal: str | None
) -> Path:
    # Late: names and errors are told without waiting for torch.
    from atomeq.potential.convert import convert_checkpoint

    made = convert_checkpoint(checkpoint, folder, modal=modal)
    card = made / "README.md"
    about = f"""
## Source

| | |
|---|---|
| package | {published.package}, `{published.member}` |
| trained on | {published.trained_on} |
| licence | {published.licence} |
| to be cited | {published.authors} |
"""
    card.write_text(card.read_text(encoding="utf-8") + about, encoding="utf-8")
    return made
