"""Structures per CPU second from an S2EF LMDB to batches of graphs, and the memory they take.

``benchmark.py loader`` writes slabs of 80 atoms with the package's own writer, reads them in random
order with OC20's graphs (12 Å, 20 nearest neighbours) on one core, and prints structures per second
and the resident memory as the run goes on; results/loader_cpu.json gets both, with
versions, device and commit.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from ase.build import fcc111
from rich.console import Console
from rich.table import Table

from atomeq.data.oc20 import open_frames
from atomeq.data.oc20_datamodule import FrameDataset
from atomeq.data.oc20_frame import OC20Frame
from atomeq.data.oc20_write import write_lmdb
from atomeq.graph.builders import NearestNeighborGraph
from benchmarks.record import RESULTS, machine, write

FILE = RESULTS / "loader_cpu.json"
METALS = ("Cu", "Pt", "Ag", "Pd", "Au", "Ni")
N_ATOMS = 80


def main(argv: list[str] | None = None) -> int:
    """Write, read, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the structures")
    parser.add_argument("--frames", type=int, default=400, help="in the file")
    parser.add_argument("--structures", type=int, help="to read; 2000, of --quick 200")
    parser.add_argument("--batch", type=int, default=8, help="structures of a batch")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    arguments = parser.parse_args(argv)
    n_structures = arguments.structures or (200 if arguments.quick else 2000)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.0000.lmdb"
        write_lmdb(path, frames(arguments.frames))
        rows = read(path, n_structures=n_structures, batch=arguments.batch)
    show(rows)
    document = {
        "machine": machine(),
        "atoms": N_ATOMS,
        "batch": arguments.batch,
        "structures_per_cpu_s": n_structures / sum(row["cpu_s"] for row in rows),
        "tenths": rows,
    }
    write(arguments.out, document)
    return 0


def frames(count: int) -> Iterator[OC20Frame]:
    """Return rattled slabs of N_ATOMS atoms with random labels."""
    rng = np.random.default_rng(0)
    for k in range(count):
        slab = fcc111(METALS[k % len(METALS)], (4, 5, 4), vacuum=10.0, periodic=True)
        layers = slab.get_tags()
        slab.rattle(0.1, seed=k)
        yield OC20Frame(
            numbers=slab.numbers.astype(np.int64),
            positions=slab.positions,
            cell=slab.cell.array,
            tags=(layers == 1).astype(np.int64),
            fixed=layers > 2,
            sid=k,
            fid=0,
            energy=float(rng.normal()),
            forces=rng.normal(size=(len(slab), 3)),
        )


def read(path: Path, *, n_structures: int, batch: int) -> list[dict[str, float]]:
    """Read structures in random order; return what each tenth of them took."""
    dataset = FrameDataset(open_frames(path), NearestNeighborGraph(12.0, 20))
    dataset[0]  # opens the file
    order = np.random.default_rng(1).integers(len(dataset), size=n_structures)
    rows = []
    for tenth in np.array_split(order, 10):
        start = time.process_time()
        n_edges = sum(
            dataset.__getitems__(tenth[k : k + batch].tolist()).n_edges
            for k in range(0, len(tenth), batch)
        )
        seconds = time.process_time() - start
        rows.append(
            {
                "structures": len(tenth),
                "edges_per_structure": n_edges / len(tenth),
                "cpu_s": seconds,
                "resident_bytes": resident_bytes(),
            }
        )
    return rows


def resident_bytes() -> int:
    """Return the memory of this process, file pages of the LMDB included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def show(rows: list[dict[str, float]]) -> None:
    """Print structures per second and memory by tenth of the run."""
    table = Table("structures", "edges each", "structures / CPU s", "memory, MB", box=None)
    read_so_far = 0
    for row in rows:
        read_so_far += int(row["structures"])
        table.add_row(
            str(read_so_far),
            f"{row['edges_per_structure']:.0f}",
            f"{row['structures'] / row['cpu_s']:.0f}",
            f"{row['resident_bytes'] / 1e6:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)
