"""The floors of the house: who may import whom, what may not be called, how long things get.

A rule is a function from a module to its complaints. Each is run over the whole package, and over
one snippet that offends it, so that a rule which stopped seeing anything fails too.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

import pytest

import atomeq

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60  # without the docstring

# Where a library may be imported: folders end with "/"; an empty tuple means nowhere.
STRUCTURE_DOORS = tuple(
    f"graph/{name}.py" for name in ("convert", "files", "neighbors", "to_structures")
)
FAMILIES = ("atoms", "coupling", "edge", "harmonics", "pairs", "segment", "sphere")
KERNELS = tuple(f"ops/{family}/triton/" for family in FAMILIES)
ASE_ROOMS = (
    "data/",
    "calculators/",
    "check/",
    "properties/",
    "propagation/",
    "screening/",
    "cli/",
)
ASE_DOORS = (*STRUCTURE_DOORS, *ASE_ROOMS)
DOORS = {
    "ase": ASE_DOORS,
    "pymatgen": ASE_DOORS,
    "lightning": ("data/datamodule.py", "training/", "propagation/", "cli/"),
    "pytorch_lightning": (),  # the same library under its old name: two copies of every class
    "wandb": (),  # loggers are named by class_path in YAML
    "triton": ("ops/triton_launch.py", *KERNELS),
    "cuequivariance": ("ops/coupling/cuequivariance.py",),
    "cuequivariance_torch": ("ops/coupling/cuequivariance.py",),
    "openequivariance": ("ops/coupling/openequivariance.py",),
}
GRADIENT_HOMES = ("potential/derivatives.py", "ops/")
WITH_CODE = ("__init__.py", "cli/__init__.py")  # the face and the entry point


@dataclass(frozen=True)
class Module:
    """One file of the package; ``path`` is relative to atomeq/."""

    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    def lives_in(self, homes: tuple[str, ...]) -> bool:
        return any(
            self.path.startswith(home) if home.endswith("/") else self.path == home
            for home in homes
        )


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, but not into ``if TYPE_CHECKING:``, whose imports never happen."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from run_time_nodes(other)
            continue
        yield child
        yield from run_time_nodes(child)


def imports(module: Module) -> dict[str, str]:
    """Map each name that an import binds to what it stands for, with dots."""
    names = {}
    for node in run_time_nodes(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                names[bound] = alias.name if alias.asname else bound
                names.setdefault(alias.name, alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def attributes(module: Module) -> Iterator[tuple[int, str]]:
    """Yield every name that is used, spelled out through the imports: (line, "torch.load")."""
    names = imports(module)
    for node in run_time_nodes(module.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            head, dot, rest = ast.unparse(node).partition(".")
            yield node.lineno, names.get(head, head) + dot + rest


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    """Yield every call and the full name of what is called."""
    names = imports(module)
    for node in run_time_nodes(module.tree):
        if isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            yield node, names.get(head, head) + dot + rest


def says(call: ast.Call, keyword: str, value: object) -> bool:
    """Whether the call has ``keyword=value`` written out."""
    return any(
        word.arg == keyword and isinstance(word.value, ast.Constant) and word.value.value is value
        for word in call.keywords
    )


def imports_stay_at_their_doors(module: Module) -> list[str]:
    libraries = {full.partition(".")[0] for full in imports(module).values()}
    return [
        f"imports {library}, which belongs in {DOORS[library] or 'no module'}"
        for library in sorted(libraries & set(DOORS))
        if not module.lives_in(DOORS[library])
    ]


def imports_are_absolute(module: Module) -> list[str]:
    return [
        f"line {node.lineno}: relative import"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def gradients_are_taken_in_one_place(module: Module) -> list[str]:
    if module.lives_in(GRADIENT_HOMES):
        return []
    return [
        f"line {line}: {name} outside {GRADIENT_HOMES}"
        for line, name in attributes(module)
        if name in {"torch.autograd.grad", "torch.autograd.functional", "torch.func.grad"}
    ]


def files_are_short(module: Module) -> list[str]:
    n_lines = len(module.source.splitlines())
    if n_lines <= MAX_FILE_LINES or module.lives_in(KERNELS):
        return []
    return [f"{n_lines} lines, more than {MAX_FILE_LINES}"]


def functions_are_short(module: Module) -> list[str]:
    if module.lives_in(KERNELS):  # kernels are one piece
        return []
    complaints = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            n_lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                n_lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            if n_lines > MAX_FUNCTION_LINES:
                complaints.append(f"{node.name} has {n_lines} lines, over {MAX_FUNCTION_LINES}")
    return complaints


def files_say_what_they_hold(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else ["no module docstring"]


def packages_only_have_docstrings(module: Module) -> list[str]:
    if not module.path.endswith("__init__.py") or module.path in WITH_CODE:
        return []
    return [f"line {node.lineno}: code in a package's __init__" for node in module.tree.body[1:]]


def nobody_prints(module: Module) -> list[str]:
    return [f"line {call.lineno}: print()" for call, name in calls(module) if name == "print"]


def networks_say_what_they_lack(module: Module) -> list[str]:
    """A block that an option leaves out is None, for readers and for the type checker."""
    if not module.lives_in(("models/", "nn/")):
        return []
    return [f"line {call.lineno}: hasattr()" for call, name in calls(module) if name == "hasattr"]


def copies(call: ast.Call) -> bool:
    """Whether it is ``pickle.loads(pickle.dumps(...))``: a copy in memory, no file."""
    return bool(call.args) and ast.unparse(call.args[0]).startswith("pickle.dumps(")


UNSAFE: dict[str, Callable[[ast.Call], bool]] = {
    "eval": lambda call: True,
    "exec": lambda call: True,
    "pickle.load": lambda call: True,
    "pickle.loads": lambda call: not copies(call),
    "joblib.load": lambda call: True,
    "yaml.load": lambda call: True,
    "yaml.full_load": lambda call: True,
    "yaml.unsafe_load": lambda call: True,
    "torch.load": lambda call: not says(call, "weights_only", True),
    # numpy's default is False; whoever names the option may only name that
    "numpy.load": lambda call: (
        any(word.arg == "allow_pickle" for word in call.keywords)
        and not says(call, "allow_pickle", False)
    ),
}


def files_cannot_run_code(module: Module) -> list[str]:
    return [
        f"line {call.lineno}: {name} may run code from what it reads"
        for call, name in calls(module)
        if name in UNSAFE and UNSAFE[name](call)
    ]


Rule = Callable[[Module], list[str]]
# Each rule, the place and the text of a snippet that breaks it, and of one that does not.
RULES: dict[Rule, tuple[tuple[str, str], tuple[str, str]]] = {
    imports_stay_at_their_doors: (
        ("models/escn.py", "def f():\n    from ase.build import bulk\n"),
        ("models/escn.py", "if TYPE_CHECKING:\n    from ase import Atoms\n"),
    ),
    imports_are_absolute: (
        ("models/escn.py", "from .base import AtomisticModel\n"),
        ("models/escn.py", "from atomeq.models.base import AtomisticModel\n"),
    ),
    gradients_are_taken_in_one_place: (
        ("models/escn.py", "from torch.autograd import grad as g\nforces = -g(e, pos)[0]\n"),
        ("potential/derivatives.py", "import torch\nf = -torch.autograd.grad(e, pos)[0]\n"),
    ),
    files_are_short: (
        ("nn/mlp.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
        ("nn/mlp.py", "x = 1\n" * MAX_FILE_LINES),
    ),
    functions_are_short: (
        ("nn/mlp.py", "class A:\n    def f(self):\n" + "        x = 1\n" * MAX_FUNCTION_LINES),
        ("nn/mlp.py", "def f():\n    '''A.\n\n    B.\n    '''\n" + "    x = 1\n" * 59),
    ),
    files_say_what_they_hold: (("nn/mlp.py", "x = 1\n"), ("nn/mlp.py", '"""Perceptrons."""\n')),
    packages_only_have_docstrings: (
        ("nn/__init__.py", '"""Blocks."""\nfrom atomeq.nn.mlp import MLP\n'),
        ("nn/__init__.py", '"""Blocks."""\n'),
    ),
    nobody_prints: (("nn/mlp.py", "print(1)\n"), ("nn/mlp.py", "console.print(1)\n")),
    networks_say_what_they_lack: (
        ("nn/mlp.py", "if hasattr(self, 'norm'):\n    pass\n"),
        ("nn/mlp.py", "if self.norm is not None:\n    pass\n"),
    ),
    files_cannot_run_code: (
        ("data/oc20.py", "from torch import load\nload('x.pt', weights_only=False)\n"),
        (
            "data/oc20.py",
            "import torch, pickle, numpy\n"
            "torch.load('x.pt', weights_only=True)\n"
            "numpy.load('x.npz', allow_pickle=False)\n"
            "pickle.loads(pickle.dumps(calculator))\n",
        ),
    ),
}


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    package = ROOT / "atomeq"
    files = sorted(package.rglob("*.py"))
    assert len(files) > 10  # the folder was found
    return [
        Module(file.relative_to(package).as_posix(), file.read_text(encoding="utf-8"))
        for file in files
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule, modules: list[Module]) -> None:
    complaints = [f"{module.path}: {text}" for module in modules for text in rule(module)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_has_teeth(rule: Rule) -> None:
    offending, fine = RULES[rule]
    assert rule(Module(*offending))
    assert not rule(Module(*fine))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nn/so3.py", "import lightning.pytorch as pl\n"),
        ("training/callbacks.py", "import wandb\n"),
        ("ops/edge/operations.py", "def f():\n    import triton.language as tl\n"),
        ("graph/builders.py", "from pymatgen.core import Structure\n"),
        ("potential/potential.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import ase\n"),
    ],
)
def test_doors_are_closed_to(path: str, source: str) -> None:
    assert imports_stay_at_their_doors(Module(path, source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x.pt')\n",
        "import torch as t\nt.load('x.pt', weights_only=flag)\n",
        "import pickle\npickle.loads(b'')\n",
        "import numpy as np\nnp.load('x.npy', allow_pickle=True)\n",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)\n",
        "eval('1 + 1')\n",
    ],
)
def test_unsafe_reading_is_seen(source: str) -> None:
    assert files_cannot_run_code(Module("data/x.py", source))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_nothing_imports_upward() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def bare_house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file of the package, without what it imports: there the contracts hold."""
    house = tmp_path_factory.mktemp("house")
    for file in (ROOT / "atomeq").rglob("*.py"):
        bare = house / file.relative_to(ROOT)
        bare.parent.mkdir(parents=True, exist_ok=True)
        bare.touch()
    shutil.copy(ROOT / "atomeq/__init__.py", house / "atomeq/__init__.py")
    shutil.copy(ROOT / "pyproject.toml", house)
    assert lint_imports(house).returncode == 0
    return house


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("graph/builders.py", "import atomeq.potential.potential\n"),
        ("ops/edge/operations.py", "from atomeq.nn import radial\n"),
        ("ops/sphere/grid.py", "from atomeq.ops.dispatch import select\n"),
        ("units.py", "import atomeq\n"),  # the face is for users
        ("models/egnn.py", "from atomeq.models import escn\n"),
    ],
)
def test_floors_have_teeth(path: str, source: str, bare_house: Path) -> None:
    """The contracts of pyproject.toml refuse an offending import in an otherwise bare house."""
    offender = bare_house / "atomeq" / path
    before = offender.read_text()
    offender.write_text(source)
    result = lint_imports(bare_house)
    offender.write_text(before)
    assert result.returncode == 1


def test_every_room_has_a_floor() -> None:
    """A new folder or file at the top would be free to import anything, were it not on the list."""
    layers = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    on_a_floor = {name for layer in layers for name in re.findall(r"atomeq\.(\w+)", layer)}
    rooms = {path.parent.name for path in (ROOT / "atomeq").glob("*/__init__.py")}
    rooms |= {path.stem for path in (ROOT / "atomeq").glob("*.py")} - {"__init__"}
    assert not rooms - on_a_floor, "name it in pyproject.toml, [[tool.importlinter.contracts]]"


def test_import_of_the_package_waits_for_nothing() -> None:
    command = "import sys, atomeq; sys.exit(bool({'torch', 'ase', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", atomeq.__all__)
def test_face_offers(name: str) -> None:
    assert getattr(atomeq, name) is not None


def test_face_names_what_it_offers_when_asked_for_more() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'load'.*load_potential"):
        atomeq.load  # noqa: B018


def test_version_is_the_same_everywhere() -> None:
    version = PYPROJECT["project"]["version"]
    assert atomeq.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


IMPORT_NAMES = {
    "ase-db-backends": "ase_db_backends",
    "lightning": "lightning.pytorch.cli",
    "pyyaml": "yaml",
    "safetensors": "safetensors.torch",
    "e3nn": "e3nn.o3",
    "pymatgen": "pymatgen.io.ase",
    "matplotlib": "matplotlib.pyplot",
    "torch_geometric": "torch_geometric.loader",
    "rich": "rich.progress",
}


@pytest.mark.parametrize("requirement", PYPROJECT["project"]["dependencies"])
def test_core_package_imports_without_a_warning(requirement: str) -> None:
    """The exceptions in filterwarnings are all that is needed: anything else is an error here."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    import_module(IMPORT_NAMES.get(name[0], name[0]))


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_script_is_what_it_seems(script: Path) -> None:
    """It parses, stops at the first error and is executable."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o100
