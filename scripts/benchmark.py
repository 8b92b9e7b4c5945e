"""Runs one benchmark: ``benchmark.py NAME [--quick] [...]``; without a NAME it lists them.

A benchmark is a file of scripts/benchmarks with a function ``main(argv)``; its head says what is
measured, and ``benchmark.py NAME --help`` its options. Rows go to scripts/benchmarks/results.
"""

import ast
import difflib
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "benchmarks"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that the first word names with the words after it."""
    words = sys.argv[1:] if argv is None else argv
    heads = benchmarks()
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip().splitlines()[0] + "\n")
        print("\n".join(f"  {name:15} {head}" for name, head in heads.items()))
        return 0
    name, *rest = words
    if name not in heads:
        near = difflib.get_close_matches(name, heads, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        print(f"no benchmark {name!r}; {meant}there are {', '.join(heads)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    return module.main(rest)


def benchmarks() -> dict[str, str]:
    """Return the first line of each benchmark by its name, without importing one."""
    heads = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            head = (ast.get_docstring(tree) or "").splitlines()[0]
            heads[path.stem.replace("_", "-")] = head
    return heads


if __name__ == "__main__":
    sys.exit(main())
