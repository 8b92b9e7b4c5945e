"""Frictions of a new user around motion: batches, ramps, starts, pictures, paths, Ctrl-C."""

import csv
import json
import os
import signal
import warnings
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from small_potential import small_potential

import atomeq
from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import VelocityVerlet

MD = "md cu.extxyz --potential small --timestep 0.5 --interval 4 --steps 10 --out md.extxyz"
RELAX = "relax cu.extxyz --potential small --out o.extxyz --max-steps 7"


def test_all_structures_of_a_file_run_as_a_batch(run, workdir, capsys):
    """Each to its own files, and each as alone, up to the noise of its place."""
    assert run(f"{MD} --index : --ensemble nve") == 0
    assert "structures : of cu.extxyz" in capsys.readouterr().out
    for k in (0, 1):
        frames = ase.io.read(f"md-{k}.extxyz", index=":")
        assert [atoms.info["step"] for atoms in frames] == [0, 4, 8, 10]
        start = ase.io.read("cu.extxyz", index=k)
        np.testing.assert_array_equal(frames[0].positions, start.positions)
        with (workdir / f"md-{k}.log.csv").open() as stream:
            assert len(list(csv.DictReader(stream))) == 4
    rows = json.loads((workdir / "md.summary.json").read_text())["structures"]
    assert [row["output"] for row in rows] == ["md-0.extxyz", "md-1.extxyz"]
    assert not (workdir / "md.extxyz").exists()
    ase.io.write("moving.extxyz", ase.io.read("md-1.extxyz", index=0))
    alone = MD.replace("cu.extxyz", "moving.extxyz").replace("md.extxyz", "alone.extxyz")
    assert run(f"{alone} --ensemble nve") == 0
    one, other = ase.io.read("alone.extxyz"), ase.io.read("md-1.extxyz")
    np.testing.assert_allclose(one.positions, other.positions, atol=1e-6)  # eight decimals in file


@pytest.mark.parametrize(("index", "frame"), [("", -1), ("--index 0", 0), ("--index 1", 1)])
def test_the_start_is_the_last_structure_or_the_one_that_is_asked_for(index, frame, run, workdir):
    assert run(f"{MD} {index}") == 0
    start = ase.io.read("cu.extxyz", index=frame)
    np.testing.assert_array_equal(ase.io.read("md.extxyz", index=0).positions, start.positions)


def test_temperature_ramps(run, workdir, capsys):
    words = MD.replace("--steps 10", "--steps 300") + " --thermostat-time 5"
    assert run(f"{words} --temperature 300 --temperature-end 1500") == 0
    with (workdir / "md.log.csv").open() as stream:
        heats = [float(line["temperature_K"]) for line in csv.DictReader(stream)]
    assert heats[0] == pytest.approx(300)
    assert np.mean(heats[-8:]) == pytest.approx(1450, rel=0.25)  # 45 degrees: 21 % of one value
    assert np.mean(heats[:8]) < 600
    assert run(f"{MD} --ensemble nve --temperature-end 500 --overwrite") == 2
    assert "needs a thermostat" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "last"), [(MD, 5.0), (RELAX, 7)])
def test_pictures_have_first_and_last_point_and_whole_labels(line, last, run, workdir, monkeypatch):
    figures, drawn = [], []
    save, plot = Figure.savefig, Axes.plot

    def saved(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    def plotted(axes, *args, **options):
        drawn.append(args)
        return plot(axes, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    monkeypatch.setattr(Axes, "plot", plotted)
    assert run(line) in (0, 1)
    marks = [words[0] for words in drawn if words[2:] == ("o",)]
    assert marks
    assert all(x == [0, last] for x in marks)
    figure = figures[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        for label in (axes.xaxis.label, axes.yaxis.label):
            box = label.get_window_extent(renderer)
            assert figure.bbox.contains(*box.min)
            assert figure.bbox.contains(*box.max)


def test_paths_are_structures_wherever_structures_are_taken(workdir):
    """A name was iterated by its letters."""
    structures = ase.io.read("cu.extxyz", index=":")
    potential = small_potential()
    for path in ("cu.extxyz", Path("cu.extxyz")):
        relaxed = list(atomeq.relax(path, potential, max_steps=1))
        assert [outcome.status for outcome in relaxed] == ["not_converged"] * 2
        moved = list(atomeq.simulate(path, potential, VelocityVerlet(0.5), n_steps=1))
        assert [outcome.status for outcome in moved] == ["completed"] * 2
        assert potential.build_graph(path).n_graphs == 2
        assert len(AtomeqCalculator("small").evaluate(path)) == 2
        assert len(atomeq.to_pymatgen(path)) == 2
    one = relaxed[1].atoms.get_chemical_formula()
    assert one == structures[1].get_chemical_formula()
    with pytest.raises(FileNotFoundError, match="there is no file absent"):
        potential.build_graph("absent.cif")


def test_a_file_among_structures_is_one_of_them(workdir):
    ase.io.write("one.cif", bulk("Cu", cubic=True))
    stream = ["one.cif", bulk("Cu"), "absent.cif"]
    outcomes = {o.index: o for o in atomeq.relax(stream, small_potential(), max_steps=1)}
    assert [outcomes[k].status for k in range(3)] == ["converged"] * 2 + ["refused"]
    assert outcomes[2].reason == "there is no file absent.cif"


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(("line", "kept"), [(MD, "md.restart"), (RELAX, "o.relax")])
def test_an_interrupted_run_says_how_it_goes_on(line, kept, kind, workdir, run, capfd):
    """In a child that interrupts itself at a step: neither clock nor load nor shell matter."""
    count, evaluate = 0, Evaluator.__call__

    def interrupting(*args, **options):
        nonlocal count
        count += 1
        if count == 7:
            os.kill(os.getpid(), kind)
        return evaluate(*args, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork, where there are threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
            Evaluator.__call__ = interrupting
            main(line.split())
        except SystemExit as exit_:
            code = exit_.code
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    errors = capfd.readouterr().err
    if kind == signal.SIGINT:
        assert f"computed is in {kept}; go on with the same options and --restart" in errors
        assert "Traceback" not in errors
    assert ase.io.read(f"{kept}/000000.extxyz", index=0).info["step"] == 0
    assert run(f"{line} --restart") in (0, 1)
