"""Wigner's 3j symbols of real harmonics and the normalised tables of a Clebsch-Gordan product."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from atomeq.ops.paths import Output, Path
from atomeq.ops.specification import Mode
from atomeq.ops.tables import constant_table


class Form(NamedTuple):
    """What is coupled: the paths, how channels couple, and where each path's result goes.

    It is the function F(x, y, w, z) = sum w z (x . y) over edges, paths and channels, linear in
    each of its four arguments; the product of x and y is its derivative with respect to z.
    """

    paths: tuple[Path, ...]
    mode: Mode
    stacked: bool  # the rows of the paths one after the other, else those of equal l3 summed

    @property
    def code(self) -> str:
        """The form as a string, which is what an operation of a traced graph can carry."""
        paths = " ".join("-".join(map(str, path)) for path in self.paths)
        return f"{self.mode} {'paths' if self.stacked else 'sum'} {paths}"

    @property
    def n_rows(self) -> int:
        """Rows of the result."""
        if self.stacked:
            return sum(2 * path.l3 + 1 for path in self.paths)
        return (max(path.l3 for path in self.paths) + 1) ** 2

    def rows(self) -> list[int]:
        """Return the first row of each path in the result."""
        if not self.stacked:
            return [path.l3**2 for path in self.paths]
        sizes = [0] + [2 * path.l3 + 1 for path in self.paths[:-1]]
        return [sum(sizes[: number + 1]) for number in range(len(sizes))]

    def n_terms(self, channels1: int, channels2: int) -> int:
        """Return how many products of channels are summed into one component by one path."""
        return channels1 * channels2 if self.mode == "uvw" else 1

    def norm(self, number: int, n_terms: int) -> float:
        """Return the factor of a path, sqrt((2 l3 + 1) / (terms summed into one component)).

        A path contributes n_terms and, unless the paths are stacked, all those of equal l3 are
        summed.
        """
        l3 = self.paths[number].l3
        sharing = 1 if self.stacked else sum(path.l3 == l3 for path in self.paths)
        return math.sqrt((2 * l3 + 1) / (sharing * n_terms))


def form_of(paths: Sequence[Path], mode: Mode, output: Output) -> Form:
    """Return what is coupled.

    Raises:
        ValueError: If mode or output is unknown, or the paths are none or break the triangle rule.
    """
    if mode not in get_args(Mode) or output not in get_args(Output):
        allowed = f"{', '.join(get_args(Mode))} and {', '.join(get_args(Output))}"
        raise ValueError(f"mode {mode!r} with output {output!r} is unknown; choose from {allowed}")
    build = _form if torch.compiler.is_compiling() else _remembered_form
    return build(tuple(tuple(path) for path in paths), mode, output)


def _form(triples: tuple[tuple[int, ...], ...], mode: Mode, output: Output) -> Form:
    paths = tuple(Path(*triple) for triple in triples)
    if not paths:
        raise ValueError("paths is empty; tensor_product_paths() lists those of given degrees")
    for l1, l2, l3 in paths:
        if min(l1, l2, l3) < 0 or not abs(l1 - l2) <= l3 <= l1 + l2:
            raise ValueError(f"path {(l1, l2, l3)} breaks |l1 - l2| <= l3 <= l1 + l2")
    return Form(paths, mode, output == "paths")


_remembered_form = cache(_form)


@cache
def form_from(code: str) -> Form:
    """Return the form that a :attr:`Form.code` is of."""
    mode, output, *paths = code.split()
    return form_of([Path(*map(int, path.split("-"))) for path in paths], mode, output)  # type: ignore[arg-type]


class Coupling(NamedTuple):
    """Paths computed together: those of one l1, and in uuu and uvw also of one l2."""

    l1: int
    rows2: tuple[int, int]  # the rows of y they read, from and to
    numbers: tuple[int, ...]  # their places in the list of paths


def couplings(paths: tuple[Path, ...], mode: Mode) -> list[Coupling]:
    """Sort paths into groups: a few large products beat many small ones.

    In uvu the single channel of y is contracted first, so one product serves every l2.
    """
    groups: dict[tuple[int, int | None], list[int]] = {}
    for number, path in enumerate(paths):
        groups.setdefault((path.l1, None if mode == "uvu" else path.l2), []).append(number)
    n2 = (max(path.l2 for path in paths) + 1) ** 2
    return [
        Coupling(l1, (0, n2) if l2 is None else (l2 * l2, (l2 + 1) ** 2), tuple(numbers))
        for (l1, l2), numbers in groups.items()
    ]


@constant_table
def clebsch_gordan(l1: int, l2: int, l3: int) -> Tensor:
    """Return the 3j symbols of real harmonics, (2 l1 + 1, 2 l2 + 1, 2 l3 + 1) float64, norm 1."""
    # Imported here because it takes seconds and most models do not need it.
    from e3nn.o3 import wigner_3j

    return wigner_3j(l1, l2, l3, dtype=torch.float64, device="cpu")


@constant_table
def path_table(form: Form, number: int, n_terms: int) -> Tensor:
    """Return the normalised 3j symbols of a path, (2 l1 + 1, 2 l2 + 1, 2 l3 + 1) float64."""
    return clebsch_gordan(*form.paths[number]) * form.norm(number, n_terms)


@constant_table
def coupling_table(form: Form, coupling: Coupling, n_terms: int) -> Tensor:
    """Return the normalised 3j symbols of a group, (rows of y, rows of output, 2 l1 + 1)."""
    first, last = coupling.rows2
    blocks = []
    for number in coupling.numbers:
        l1, l2, l3 = form.paths[number]
        block = torch.zeros(last - first, 2 * l3 + 1, 2 * l1 + 1, dtype=torch.float64, device="cpu")
        rows = slice(l2 * l2 - first, (l2 + 1) ** 2 - first)
        block[rows] = path_table(form, number, n_terms).permute(1, 2, 0)
        blocks.append(block)
    return torch.cat(blocks, dim=1)
