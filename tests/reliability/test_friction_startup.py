"""What needs no network is answered before torch is imported, and the calculator imports little."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest

from atomeq.cli import VERBS
from atomeq.cli.parsers import data, screen
from atomeq.data.oc20_write import FileFormat
from atomeq.propagation.nbody import System
from atomeq.screening.run import EngineName

HEAVY = ("torch", "ase", "lightning", "numpy", "pymatgen", "matplotlib")
CPU_SECONDS = 1.0  # of one process that answers all lines below; torch alone takes 1.4
CALCULATOR_CPU_SECONDS = 3.5  # 1.9 where it was measured; 4.7 with PyG and matplotlib

HELPS = [
    *(f"{verb} --help" for verb in VERBS),
    *(f"data {name} --help" for name in ("list", "download", "convert", "metadata", "nbody")),
]
USAGE_ERRORS = {
    "relxx cu.xyz": "did you mean 'relax'?",
    "relax cu.xyz --potential cu-pbe --out out.xyz --fmaxx 1": "--fmaxx",
    "relax cu.xyz --potential cu-pbe --out out.pdb": ".extxyz",
    "relax cu.xyz --potential cu-pbe --out nowhere/out.xyz": "no folder nowhere",
    "md cu.xyz --potential cu-pbe --out out.xyz --ensemble nph": "nph",
    "md cu.xyz --potential cu-pbe --out out.xyz --steps 0": "steps",
    "neb cu.xyz --potential cu-bpe --out out.xyz": "did you mean 'cu-pbe'?",
    "eos cu.xyz --potential cu-pbe --out out.xyz --device tpu": "'tpu' is not a device",
    "phonons cu.xyz --potential cu-pbe --out out.xyz --dtype half": "half",
    "serve cu.xyz": "potential",
    "data train": "no command 'train'",
    "check cu-pbe --json nowhere/laws.json": "no folder nowhere",
    "fit": "give a configuration",
}
MISSING_FILES = {
    "single-point absent.cif --potential cu-pbe --out out.xyz": "no file absent.cif",
    "relax cu.xyz --potential absent --out out.xyz": "no potential at 'absent'",
    "screen absent/ --potential cu-pbe --out out": "no file or folder absent",
    "screen cu.xyz --potential cu-pbe --out out --config absent.yaml": "no file absent.yaml",
    "rollout absent.npz --propagator x --out out.npz": "no file absent.npz",
    "convert absent.pt out": "no file absent.pt",
    "export absent --out cu.pt2": "no potential at 'absent'",
    "data metadata absent": "no file or folder absent",
    "is2re absent --potential cu-pbe --out out.json": "no file or folder absent",
    "fit -c absent.yaml": "no file absent.yaml",
    "predict --config=absent.yaml": "no file absent.yaml",
    "check absent": "no potential at 'absent'",
    "rollout cu.xyz --propagator absent --out out.npz": "no propagator at 'absent'",
    "check cu-pbe --structure absent.cif": "no file absent.cif",
}


def answers(lines: list[str], folder: Path) -> list[tuple[int, str, str]]:
    """Run lines in one process; return code, output and errors of each, and hold it to its cost."""
    code = f"""
        import contextlib, io, json, sys, time
        from atomeq.cli import main
        answers = []
        for line in json.loads(sys.argv[1]):
            out, err, code = io.StringIO(), io.StringIO(), 0
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main(line.split())
                except SystemExit as end:
                    code = end.code or 0
            answers.append((code, out.getvalue(), err.getvalue()))
            assert not {set(HEAVY)} & set(sys.modules), line
        print(json.dumps((answers, time.process_time())))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, seconds = json.loads(done.stdout)
    assert seconds < CPU_SECONDS
    return found


def test_helps_need_no_torch(tmp_path):
    for line, (code, out, _) in zip(HELPS, answers(HELPS, tmp_path), strict=True):
        assert code == 0, line
        assert f"usage: atomeq {line.removesuffix(' --help')}" in out


@pytest.mark.parametrize("cases", [USAGE_ERRORS, MISSING_FILES], ids=["usage", "missing"])
def test_bad_words_need_no_torch(cases, tmp_path):
    (tmp_path / "cu.xyz").touch()
    for line, (code, out, err) in zip(cases, answers(list(cases), tmp_path), strict=True):
        assert code == 2, line
        assert not out
        assert err.count("\n") == 1
        assert err.startswith("atomeq")
        assert cases[line] in err
    assert [path.name for path in tmp_path.iterdir()] == ["cu.xyz"]


def test_choices_of_the_parsers_are_those_of_what_does_the_work():
    """They are written twice, for the parsers import nothing that needs torch."""
    nbody = data._data_parser("nbody")
    for parser, words, option, choices in (
        (data._data_parser("convert"), "a b", "format", get_args(FileFormat)),
        (nbody, "out.npz", "system", get_args(System)),
        (screen.build_parser(), "a --out o", "engine", get_args(EngineName)),
    ):
        for choice in choices:
            options = parser.parse_args([*words.split(), f"--{option}", choice])
            assert options[option] == choice
        with pytest.raises(SystemExit):
            parser.parse_args([*words.split(), f"--{option}", "another"])


def test_the_calculator_imports_what_it_uses():
    """PyG brings torch._dynamo, ASE's vibrations matplotlib: both cost more than torch itself."""
    unused = {
        *("torch_geometric", "torch._dynamo", "sympy", "matplotlib", "networkx", "pandas"),
        *("pymatgen", "lightning", "e3nn", "triton", "rdkit"),
    }
    code = f"""
        import sys, time
        from atomeq import AtomeqCalculator
        assert not {unused} & set(sys.modules), {unused} & set(sys.modules)
        print(time.process_time())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < CALCULATOR_CPU_SECONDS
