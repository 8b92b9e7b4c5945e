"""Published potentials on a hub: where they are, what has to be agreed to, what is installed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_cases import SLAB, published_checkpoint

from atomeq.cli import main
from atomeq.potential import catalogue
from atomeq.potential.catalogue import CATALOGUE, HubFile, InstallError, install_potential
from atomeq.potential.checkpoint import load_potential


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ATOMEQ_POTENTIALS", str(tmp_path / "potentials"))
    return tmp_path / "potentials"


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A file of a hub that is a folder, in the place of EquiformerV3's."""
    file = tmp_path / "hub" / "owner" / "models" / "resolve" / "main" / "there" / "file.pt"
    file.parent.mkdir(parents=True)
    torch.save(published_checkpoint(SLAB), file)
    entry = replace(
        CATALOGUE["equiformer-v3-mp"],
        source=HubFile("owner/models", "there/file.pt", hub=(tmp_path / "hub").as_uri()),
        n_parameters=None,
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "equiformer-v3-mp", entry)
    return file


def n_parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in load_potential(name).model.parameters())


def test_a_file_of_a_hub_is_fetched_checked_and_installed(published, root, monkeypatch, capsys):
    main(["potentials", "install", "equiformer-v3-mp"])
    assert "licence: MIT; please cite Y.-L. Liao" in capsys.readouterr().out
    main(["potentials", "show", "equiformer-v3-mp"])
    card = capsys.readouterr().out
    assert "owner/models, `there/file.pt`" in card
    assert "none is published" in card
    right = replace(CATALOGUE["equiformer-v3-mp"], n_parameters=n_parameters("equiformer-v3-mp"))
    monkeypatch.setitem(catalogue.CATALOGUE, "equiformer-v3-mp", right)
    install_potential("equiformer-v3-mp", file=published, overwrite=True)
    other = replace(right, n_parameters=right.n_parameters + 1)
    monkeypatch.setitem(catalogue.CATALOGUE, "equiformer-v3-mp", other)
    with pytest.raises(InstallError, match="it is another file; nothing was installed"):
        install_potential("equiformer-v3-mp", overwrite=True)
    monkeypatch.setitem(catalogue.CATALOGUE, "equiformer-v3-mp", replace(right, sha256="0" * 64))
    with pytest.raises(InstallError, match="SHA-256"):
        install_potential("equiformer-v3-mp", overwrite=True)
    assert [path.name for path in root.iterdir()] == ["equiformer-v3-mp"]


def test_what_cannot_be_downloaded_can_be_given(published, root):
    moved = published.rename(published.parent / "elsewhere.pt")
    with pytest.raises(InstallError, match=r"file\.pt cannot be downloaded.*--from FILE"):
        install_potential("equiformer-v3-mp")
    install_potential("equiformer-v3-mp", file=moved)
    with pytest.raises(InstallError, match="no file nowhere"):
        install_potential("equiformer-v3-mp", file="nowhere.pt", overwrite=True)


@pytest.mark.parametrize("name", ["eqv2-31m-omat", "eqv2-86m-dens-mp", "esen-30m-oam"])
def test_gated_files_say_what_to_agree_to_and_where(name, root, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["potentials", "install", name])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    for words in (
        "agree to the OMat24 License",
        "https://huggingface.co/facebook/OMAT24",
        "--from",
    ):
        assert words in said


def test_all_are_listed_with_what_they_were_trained_on(root, capsys):
    main(["potentials", "list"])
    listed = capsys.readouterr().out
    for name in CATALOGUE:
        assert name in listed
    urls = [one.source.url for one in CATALOGUE.values() if isinstance(one.source, HubFile)]
    assert len(set(urls)) == len(urls) == 17
    assert all(url.startswith("https://huggingface.co/") for url in urls)
