"""``atomeq data ...`` and ``atomeq is2re``: public data sets, OC20's files and its tasks."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from atomeq.cli.terminal import Meter, say, show_table
from atomeq.cli.verbs import load
from atomeq.data.ase_files import (
    DATA_VARIABLE,
    ELECTRIC_SHAPES,
    DataError,
    LabelKeys,
    expand_data_path,
    read_structures,
)
from atomeq.data.download import DATA_SETS, download
from atomeq.data.molecule_download import MOLECULE_SETS, download_molecules
from atomeq.data.molecule_files import STORED_FORMATS, reader_of
from atomeq.data.oc20 import open_frames
from atomeq.data.oc20_download import ARCHIVES, Archive, fetch, unpack
from atomeq.data.oc20_frame import EnergyKind
from atomeq.data.oc20_write import FileFormat, convert, metadata_file, write_metadata
from atomeq.files import refuse_existing, refuse_unwritable, write_atomically
from atomeq.propagation.nbody import NBodyRecipe
from atomeq.propagation.recordings import simulated, write_systems
from atomeq.properties.relaxation import relax_frame
from atomeq.training.oc20_metrics import (
    ENERGY_THRESHOLD,
    average_distance_within_threshold,
    mean_distance,
)

_MIB = 2**20


def nbody(options: Namespace) -> int:
    """Simulate few-body systems."""
    if Path(options.out).suffix != ".npz":
        raise ValueError(f"cannot write {options.out}: give it the suffix .npz")
    refuse_unwritable(options.out)
    if not all(word.strip().isdigit() for word in options.frames.split(",")):
        raise ValueError(f"frames are numbers, as in 30,40,50; got {options.frames!r}")
    recipe = NBodyRecipe(
        options.system,
        options.n_bodies,
        num_train=options.num,
        num_val=0,
        num_test=0,
        seed=options.seed,
        frames=tuple(int(word) for word in options.frames.split(",")),
    )
    write_systems(options.out, simulated(recipe))
    say(f"wrote {options.out}: {options.num} systems of {options.n_bodies} bodies")
    return 0


def list_sets(_: Namespace) -> int:
    """Show the data sets that can be downloaded."""
    rows = [[name, known.licence, known.source] for name, known in DATA_SETS.items()]
    rows += [
        [name, "CC-BY-4.0", f"{archive.url} ({archive.size} unpacked)"]
        for name, archive in ARCHIVES.items()
    ]
    rows += [
        [name, known.licence, f"{known.files[0].url} and {len(known.files) - 1} more"]
        for name, known in MOLECULE_SETS.items()
    ]
    show_table(["set", "licence", "source"], rows, most=len(rows))
    return 0


def download_set(options: Namespace) -> int:
    """Fetch a data set."""
    known = (*DATA_SETS, *MOLECULE_SETS, *ARCHIVES)
    if options.name is None:
        raise DataError(f"name a data set to download: {', '.join(known)}")
    if options.name not in known:
        raise DataError(
            f"there is no data set {options.name!r} to download; known: {', '.join(known)}"
        )
    folder = options.folder or os.environ.get(DATA_VARIABLE)
    if not folder:
        raise DataError(f"say where to put it: --folder FOLDER, or set {DATA_VARIABLE}")
    logging.getLogger("atomeq").setLevel(logging.INFO)
    if options.name in DATA_SETS:
        paths = download(options.name, folder, source=options.source)
        say(f"{options.name}: {len(paths)} files in {paths[0].parent}")
        return 0
    if options.name in MOLECULE_SETS:
        paths = download_molecules(options.name, folder, source=options.source)
        say(f"{options.name}: {len(paths)} files in {paths[0].parent}")
        return 0
    archive = ARCHIVES[options.name]
    if options.source is not None:
        url = f"{options.source.rstrip('/')}/{archive.file_name}"
        archive = Archive(url, archive.md5, archive.size)
    target = Path(folder) / "oc20" / options.name
    _fetch_archive(archive, target, keep=options.keep_archive)
    say(f"{options.name} is in {target}; its MD5 sum is {archive.md5}, as published")
    return 0


def _fetch_archive(archive: Archive, target: Path, *, keep: bool) -> None:
    if target.exists():
        raise DataError(f"{target} exists already; nothing was fetched")
    meter: Meter | None = None

    def report(present: int, total: int) -> None:
        nonlocal meter
        if meter is None:
            meter = Meter(archive.file_name, max(1, total // _MIB), unit="MiB")
        meter.advance(present // _MIB - meter.done)

    file = fetch(archive, target.parent, report=report)
    unpack(file, target)
    if not keep:
        file.unlink()


def label_keys(text: str) -> LabelKeys:
    """Return what files call their labels, from ``energy=KEY,forces=KEY``.

    Raises:
        ValueError: There is no such label, or no key.
    """
    allowed = ["energy", "forces", "stress", *ELECTRIC_SHAPES, "scalar", "weight"]
    given: dict[str, str] = {}
    for word in filter(None, text.split(",")):
        name, _, given[name] = word.partition("=")
    wrong = [name for name, key in given.items() if name not in allowed or not key]
    if wrong:
        raise ValueError(
            f"labels are given as energy=KEY,forces=KEY; {wrong[0]!r} is none of {allowed}"
        )
    return replace(LabelKeys(), **given)


def _convert_to_stored(options: Namespace) -> int:
    from atomeq.data.stored_files import write_stored  # brings h5py

    refuse_existing(options.target, overwrite=options.overwrite)
    source = expand_data_path(options.source)
    labels = label_keys(options.labels)
    structures = read_structures(source, labels=labels, reader=reader_of(source))
    n_structures = write_stored(options.target, structures)
    say(f"{n_structures} structures in {options.target}")
    return 0


def convert_files(options: Namespace) -> int:
    """Rewrite data in another format."""
    by_suffix = STORED_FORMATS.get(Path(options.target).suffix)
    wanted: Any = options.format or by_suffix or "lmdb"
    if wanted != by_suffix and (by_suffix or wanted in STORED_FORMATS.values()):
        suffixes = ", ".join(f"{one} is {name}" for one, name in STORED_FORMATS.items())
        raise DataError(f"cannot write {options.target} as {wanted}: of suffixes {suffixes}")
    if by_suffix:
        return _convert_to_stored(options)
    meter: Meter | None = None

    def report(done: int, total: int) -> None:
        nonlocal meter
        if meter is None:
            meter = Meter("convert", total, unit="frames")
        meter.advance(done - meter.done)

    file_format: FileFormat = wanted
    energy: EnergyKind = options.energy
    n_frames = convert(
        expand_data_path(options.source),
        options.target,
        file_format=file_format,
        energy=energy,
        frames_per_file=options.frames_per_file,
        report=report,
    )
    say(f"{n_frames} frames in {options.target}")
    return 0


def metadata(options: Namespace) -> int:
    """Write metadata.npz."""
    source = expand_data_path(options.source)
    refuse_existing(metadata_file(source), overwrite=options.overwrite)
    meter: Meter | None = None

    def report(done: int, total: int) -> None:
        nonlocal meter
        if meter is None:
            meter = Meter("metadata", total, unit="frames")
        meter.advance(done - meter.done)

    say(f"wrote {write_metadata(source, report=report)}")
    return 0


def is2re(options: Namespace) -> int:
    """Relax initial structures and compare with DFT."""
    refuse_unwritable(options.out)
    frames = open_frames(expand_data_path(options.source))
    calculator = load(options.potential, options)
    n_systems = min(len(frames), options.limit or len(frames))
    rows: list[dict[str, Any]] = []
    meter = Meter("is2re", n_systems, unit="systems")
    with meter.running():
        for index in range(n_systems):
            frame = frames[index]
            relaxed = relax_frame(frame, calculator, fmax=options.fmax, max_steps=options.max_steps)
            row: dict[str, Any] = {
                "sid": frame.sid,
                "energy": relaxed.energy,
                "steps": relaxed.n_steps,
                "converged": relaxed.converged,
            }
            if frame.relaxed_energy is not None:
                row["energy_error"] = relaxed.energy - frame.relaxed_energy
            if frame.relaxed_positions is not None and not frame.fixed.all():
                free = ~frame.fixed
                row["mean_distance"] = mean_distance(
                    relaxed.positions[free], frame.relaxed_positions[free], frame.cell
                )
            rows.append(row)
            meter.advance()
    metrics = _is2re_metrics(rows)
    with write_atomically(options.out) as partial:
        partial.write_text(json.dumps({"metrics": metrics, "systems": rows}, indent=2) + "\n")
    show_table(["metric", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()])
    return 0


def _is2re_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    errors = np.abs([row["energy_error"] for row in rows if "energy_error" in row])
    distances = [row["mean_distance"] for row in rows if "mean_distance" in row]
    metrics: dict[str, float] = {
        "systems": len(rows),
        "converged": sum(row["converged"] for row in rows),
    }
    if len(errors):
        metrics["energy MAE, eV"] = float(errors.mean())
        metrics["EwT"] = float((errors < ENERGY_THRESHOLD).mean())
    if distances:
        metrics["ADwT"] = average_distance_within_threshold(distances)
    return metrics
