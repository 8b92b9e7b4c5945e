"""``atomeq select`` writes structures with their labels, the most telling first, and a table."""

import json

import ase.io
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.screening.identity import content_hash


def test_select_writes_structures_and_a_table(run, workdir, capsys):
    structures = []
    for k in range(6):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.03 * (1 + k), seed=k)
        atoms.calc = SinglePointCalculator(atoms, energy=float(k))
        structures.append(atoms)
    ase.io.write("one.extxyz", structures[:3])
    ase.io.write("two.extxyz", [*structures[3:], structures[1]])
    ase.io.write("known.extxyz", structures[:1])
    words = "select one.extxyz two.extxyz --potential small --number 3 --out chosen.extxyz"
    assert run(f"{words} --train known.extxyz") == 0
    assert "3 of 7 structures, 2 copies left out" in capsys.readouterr().out
    told = json.loads((workdir / "chosen.summary.json").read_text())
    chosen = ase.io.read("chosen.extxyz", index=":")
    assert [row["rank"] for row in told["chosen"]] == [0, 1, 2]
    for atoms, row in zip(chosen, told["chosen"], strict=True):
        file, frame = row["locator"].split("#")
        source = ase.io.read(file, index=int(frame))
        assert atoms.info["id"] == row["id"] == content_hash(source)
        assert atoms.get_potential_energy() == source.get_potential_energy()
    assert told["chosen"][0]["locator"] == "two.extxyz#2"  # the most displaced
    left_out = {row["locator"]: row["copy_of"] for row in told["copies"]}
    repeated = content_hash(structures[1])
    assert left_out == {"one.extxyz#0": "training", "two.extxyz#3": repeated}
    assert run(f"{words} --by spread --overwrite") == 2
    assert "does not know its uncertainty" in capsys.readouterr().err
