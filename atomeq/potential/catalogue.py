"""Published potentials that can be installed by name: where they are, and whose they are.

Some lie inside a wheel of the Python package index: pip fetches that one file and nothing is
installed. Others are files of a hub. Either way the checkpoint is read as data, checked and
converted, and no code that came with it runs.
"""

import hashlib
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from atomeq.potential.folders import CONFIG_FILE, user_root

_TIMEOUT = 60  # s, without a byte


class InstallError(ValueError):
    """A published potential cannot be had, or what came is not what it should be."""


@dataclass(frozen=True)
class Wheel:
    """A place inside a wheel of the Python package index.

    Attributes:
        member: The file in the wheel.
        package: Name and version in the index.
        sha256: Of the wheel.
    """

    member: str
    package: str = "sevenn==0.13.0"
    sha256: str = "9378f7df2b75fe83274483a5f804790ae1023dd22ddeb6a48c1a03de97e22620"

    def __str__(self) -> str:
        """Say where the file is."""
        return f"{self.package}, `{self.member}`"

    def fetch(self, given: Path | None, scratch: Path) -> Path:
        """Return the checkpoint, from a wheel that is given or that pip downloads."""
        wheel = self._downloaded(scratch) if given is None else given
        if not wheel.is_file():
            raise InstallError(f"there is no wheel {wheel}")
        _check(wheel, self.sha256, wheel)
        path = scratch / Path(self.member).name
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(self.member))
        return path

    def _downloaded(self, scratch: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch)]
        done = subprocess.run([*command, self.package], capture_output=True, text=True)
        found = sorted(scratch.glob("*.whl"))
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise InstallError(
                f"pip cannot download {self.package}: {reason}; where the package index is out of "
                "reach, fetch the wheel elsewhere and give it by --from FILE"
            )
        return found[0]


@dataclass(frozen=True)
class HubFile:
    """A file of the hub of Hugging Face.

    Attributes:
        repository: Owner and name.
        path: The file in it.
        gated: What has to be done before the hub gives it out; nothing if empty.
        hub: Where the hub is.
    """

    repository: str
    path: str
    gated: str = ""
    hub: str = "https://huggingface.co"

    def __str__(self) -> str:
        """Say where the file is."""
        return f"{self.page}, `{self.path}`"

    @property
    def page(self) -> str:
        """Where its repository is looked at."""
        return f"{self.hub}/{self.repository}"

    @property
    def url(self) -> str:
        """Where the file itself is."""
        return f"{self.page}/resolve/main/{self.path}"

    def fetch(self, given: Path | None, scratch: Path) -> Path:
        """Return the checkpoint: what is given, or what the hub gives to everybody."""
        if given is not None:
            if not given.is_file():
                raise InstallError(f"there is no file {given}")
            return given
        if self.gated:
            raise InstallError(
                f"{self.path} is not given to everybody: {self.gated} at {self.page}, download "
                f"{self.url} as its user, and install it by --from FILE"
            )
        path = scratch / Path(self.path).name
        try:
            with (
                urllib.request.urlopen(self.url, timeout=_TIMEOUT) as response,  # https, a constant
                path.open("wb") as stream,
            ):
                while block := response.read(1 << 20):
                    stream.write(block)
        except (urllib.error.URLError, OSError) as error:
            raise InstallError(
                f"{self.url} cannot be downloaded: {error}; fetch it elsewhere and give it by "
                "--from FILE"
            ) from error
        return path


@dataclass(frozen=True)
class PublishedPotential:
    """A checkpoint that its authors give out.

    Attributes:
        source: Where it is.
        trained_on: Data, as its authors say.
        licence: As they state it.
        authors: To be cited.
        sha256: Of the checkpoint, where one is published.
        size: Of the file, where it is published.
        n_parameters: Of the network, where that is published; another number is another file.
        modalities: Of a potential of several, one of which has to be chosen.
        outside: What these data do not hold.
    """

    source: Wheel | HubFile
    trained_on: str
    licence: str
    authors: str
    sha256: str = ""
    size: str = ""
    n_parameters: int | None = None
    modalities: tuple[str, ...] = ()
    outside: str = (
        "molecules, clusters, reactions, charged and excited states, pairs of elements that none "
        "of its structures holds; it answers for them, and nothing says how well"
    )


_MPTRJ = "MPtrj: relaxations of the Materials Project, PBE and PBE+U"
_SEVENNET = (
    "MIT, Copyright (c) 2024 Yutack Park",
    "Y. Park, J. Kim, S. Hwang and S. Han, Scalable parallel algorithm for graph neural network "
    "interatomic potentials in molecular dynamics simulations, J. Chem. Theory Comput. 20, 4857 "
    "(2024)",
)


def _sevennet(
    folder: str, file: str, sha256: str, trained_on: str, modalities: tuple[str, ...] = ()
) -> PublishedPotential:
    member = f"sevenn/pretrained_potentials/{folder}/checkpoint_{file}.pth"
    licence, authors = _SEVENNET
    return PublishedPotential(
        Wheel(member), trained_on, licence, authors, sha256, modalities=modalities
    )


_OMAT = "OMat24: PBE and PBE+U; energies are not those of the Materials Project"
_SALEX = "OMat24, then MPtrj and subsampled Alexandria: PBE and PBE+U"
_OMAT24_GATE = "log in, agree to the OMat24 License and to share your contact information"


def _omat24(
    file: str, trained_on: str, authors: str, n_parameters: int | None = None, size: str = ""
) -> PublishedPotential:
    return PublishedPotential(
        HubFile("facebook/OMAT24", file, _OMAT24_GATE),
        trained_on,
        "OMat24 License of 23 October 2024, with the FAIR Acceptable Use Policy",
        authors,
        size=size,
        n_parameters=n_parameters,
    )


_EQV2 = (
    "Y.-L. Liao, B. Wood, A. Das and T. Smidt, EquiformerV2, ICLR 2024, arXiv:2306.12059; "
    "L. Barroso-Luque et al., Open Materials 2024 (OMat24), arXiv:2410.12771"
)
_DENS = (
    f"{_EQV2}; Y.-L. Liao, T. Smidt, M. Shuaibi and A. Das, Generalizing denoising to "
    "non-equilibrium structures, arXiv:2403.09549"
)
_ESEN = (
    "X. Fu et al., Learning smooth and expressive interatomic potentials for physical property "
    "prediction, arXiv:2502.12147; L. Barroso-Luque et al., OMat24, arXiv:2410.12771"
)


def _equiformer_v3(file: str, trained_on: str, n_parameters: int | None) -> PublishedPotential:
    return PublishedPotential(
        HubFile("mirror-physics/equiformer_v3", f"checkpoint/{file}.pt"),
        trained_on,
        "MIT",
        "Y.-L. Liao, A. J. Hoffman, S. C. Shen, A. Duval, S. W. Norwood and T. Smidt, "
        "EquiformerV3, arXiv:2604.09130",
        n_parameters=n_parameters,
    )


CATALOGUE: dict[str, PublishedPotential] = {
    "sevennet-0": _sevennet(
        "SevenNet_0__11Jul2024",
        "sevennet_0",
        "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36",
        _MPTRJ,
    ),
    "sevennet-l3i5": _sevennet(
        "SevenNet_l3i5",
        "l3i5",
        "a7ff190d41efe5b8317a03d20a468e4036a1a3e64e0b14fdbab64ac3f4bfc09d",
        _MPTRJ,
    ),
    "sevennet-mf-0": _sevennet(
        "SevenNet_MF_0",
        "sevennet_mf_0",
        "81791329b37d445f46b531578c182c41792d98c7814222c9e5dde276402225fd",
        f"{_MPTRJ}, and r2SCAN labels of the same project",
        ("PBE", "R2SCAN"),
    ),
    "sevennet-0-22may2024": _sevennet(
        "SevenNet_0__22May2024",
        "sevennet_0",
        "5d389fafd512e6ae2830d74d0b66ffc49a55d3832653ff8e7bf7f1343013c1d1",
        f"{_MPTRJ}; superseded by sevennet-0",
    ),
    "eqv2-31m-omat": _omat24("eqV2_31M_omat.pt", _OMAT, _EQV2, 31_207_434),
    "eqv2-86m-omat": _omat24("eqV2_86M_omat.pt", _OMAT, _EQV2, 86_589_068),
    "eqv2-153m-omat": _omat24("eqV2_153M_omat.pt", _OMAT, _EQV2, 153_769_868),
    "eqv2-31m-oam": _omat24("eqV2_31M_omat_mp_salex.pt", _SALEX, _EQV2, 31_207_434, "126 MB"),
    "eqv2-86m-oam": _omat24("eqV2_86M_omat_mp_salex.pt", _SALEX, _EQV2, 86_589_068),
    "eqv2-153m-oam": _omat24("eqV2_153M_omat_mp_salex.pt", _SALEX, _EQV2, 153_769_868),
    "eqv2-31m-mp": _omat24("eqV2_31M_mp.pt", _MPTRJ, _EQV2, 31_207_434),
    "eqv2-31m-dens-mp": _omat24("eqV2_dens_31M_mp.pt", _MPTRJ, _DENS, 31_207_434),
    "eqv2-86m-dens-mp": _omat24("eqV2_dens_86M_mp.pt", _MPTRJ, _DENS),
    "eqv2-153m-dens-mp": _omat24("eqV2_dens_153M_mp.pt", _MPTRJ, _DENS),
    "esen-30m-omat": _omat24("esen_30m_omat.pt", _OMAT, _ESEN),
    "esen-30m-oam": _omat24("esen_30m_oam.pt", _SALEX, _ESEN, 30_161_153),
    "esen-30m-mp": _omat24("esen_30m_mptrj.pt", _MPTRJ, _ESEN, 30_085_121),
    "equiformer-v3-mp": _equiformer_v3("mptrj_gradient", _MPTRJ, 30_278_113),
    "equiformer-v3-omat-direct": _equiformer_v3("omat24_direct", _OMAT, None),
    "equiformer-v3-omat": _equiformer_v3("omat24_gradient", _OMAT, None),
    "equiformer-v3-oam": _equiformer_v3("omat24-mptrj-salex_gradient", _SALEX, 30_333_409),
}


def install_potential(
    name: str,
    *,
    file: str | Path | None = None,
    modal: str | None = None,
    zbl: bool = False,
    overwrite: bool = False,
) -> Path:
    """Fetch, check and convert a published potential into the user's folder of potentials.

    Args:
        name: As in :data:`CATALOGUE`.
        file: The checkpoint on disk, or the wheel it is in; by default it is downloaded.
        modal: Which modality, of a potential of several; it becomes part of the name.
        zbl: Add the repulsion of nuclei where atoms are closer than in the data; it becomes part of
            the name, for there the numbers are no longer the published ones.
        overwrite: Replace what is there.

    Returns:
        The folder, whose name :func:`~atomeq.potential.checkpoint.load_potential` knows.

    Raises:
        InstallError: No such potential or modality, no file, one with other content, or one that
            is only given to who agrees to its terms.
        FileExistsError: It is installed already.
    """
    published = published_potential(name)
    folder = user_root() / (installed_name(name, modal) + ("-zbl" if zbl else ""))
    if (folder / CONFIG_FILE).is_file() and not overwrite:
        raise FileExistsError(f"{folder} is installed already; --overwrite replaces it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".installing-") as scratch:
        given = None if file is None else Path(file)
        checkpoint = published.source.fetch(given, Path(scratch))
        if published.sha256:
            _check(checkpoint, published.sha256, published.source)
        made = _converted(published, checkpoint, Path(scratch) / folder.name, modal, zbl=zbl)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        made.rename(folder)  # whole or not at all
    return folder


def published_potential(name: str) -> PublishedPotential:
    """Return what is known of a published potential.

    Args:
        name: As `atomeq potentials list` prints it.

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


def _check(path: Path, expected: str, what: object) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise InstallError(
            f"{what} has SHA-256 {found[:16]}…, expected {expected[:16]}…: it is damaged or not "
            "the published one; nothing was installed"
        )


def _converted(
    published: PublishedPotential, checkpoint: Path, folder: Path, modal: str | None, *, zbl: bool
) -> Path:
    # Late: names and errors are told without waiting for torch.
    from atomeq.potential.checkpoint import load_potential
    from atomeq.potential.convert import convert_checkpoint

    made = convert_checkpoint(checkpoint, folder, modal=modal, zbl=zbl)
    expected = published.n_parameters
    if expected is not None:
        found = sum(parameter.numel() for parameter in load_potential(made).model.parameters())
        if found != expected:
            raise InstallError(
                f"{checkpoint} has {found:,} parameters, the published {published.source} has "
                f"{expected:,}: it is another file; nothing was installed"
            )
    card = made / "README.md"
    about = f"""
## Source

| | |
|---|---|
| from | {published.source}{f", {published.size}" if published.size else ""} |
| SHA-256 | {published.sha256 or "none is published"} |
| trained on | {published.trained_on} |
| outside of it | {published.outside} |
| licence | {published.licence} |
| to be cited | {published.authors} |
"""
    card.write_text(card.read_text(encoding="utf-8") + about, encoding="utf-8")
    return made
