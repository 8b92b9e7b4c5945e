"""The Clebsch-Gordan product and convolution as one registered operation closed under derivatives.

    F(x, y, w, z) = sum over edges, paths and channels of w z (x . y)

is linear in each of its four arguments: features x of the sources, y and w of the edges, z of the
targets. The convolution of x with y is dF/dz. If h is the cotangent of dF/ds for one argument s,
then <h, dF/ds> is F with h in the place of s: whatever is differentiated, partial derivatives of F
come out, so one operation has derivatives of every order.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Form
from atomeq.ops.edge.frame import segments_of
from atomeq.ops.paths import Path
from atomeq.ops.registration import kernels_of, registered
from atomeq.ops.specification import Mode
from atomeq.ops.tables import constant_in_traces

ARGUMENTS = ("x", "y", "weights", "z")
_FIXED = ("ends", "segments", "n_targets", "paths", "mode", "stacked", "kernels")


def couple(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    ends: tuple[Tensor, Tensor] | None,
    n_targets: int,
    form: Form,
    kernels: str,
) -> Tensor:
    """Return dF/dz: the product, gathered by and summed over ends if there are any.

    Args:
        x: (n_sources, n1, U).
        y: (n_edges, n2), or (n_edges, n2, channels).
        weights: ([n_edges,] n_paths, ...); None for weights of 1.
        ends: Source and target of each edge; None if x and the result belong to the edges.
        n_targets: Number of targets.
        form: What is coupled.
        kernels: Name of the kernel set.

    Returns:
        (n_targets, rows, channels).
    """
    indices = [] if ends is None else [end.contiguous() for end in ends]
    numbers = [l for path in form.paths for l in path]
    (product,) = cg_partials(
        *(x, y, weights, None, indices, segments_for(x, indices, n_targets, kernels)),
        *(n_targets, "z", numbers, form.mode, form.stacked, kernels),
    )
    return product


@constant_in_traces
def wants_segments(kernels: str) -> bool:
    """Return whether these kernels want sorted edges; a constant of a traced graph."""
    return kernels_of("coupling", kernels).WANTS_SEGMENTS


def segments_for(x: Tensor, ends: list[Tensor], n_targets: int, kernels: str) -> list[Tensor]:
    """Sort the edges once for the product and all its derivatives, if the kernels want that."""
    if not ends or not wants_segments(kernels):
        return []
    found = [*segments_of(ends[1], n_targets)]
    if x.requires_grad:  # only the derivative by x sums on the sources
        found += segments_of(ends[0], x.shape[0])
    return found


def _fake_partials(call: SimpleNamespace) -> list[Tensor]:
    x, weights = call.x, call.weights
    channels = weights.shape[-1] if weights is not None and call.mode == "uvw" else x.shape[-1]
    n_rows = form_from(call.paths, call.mode, call.stacked).n_rows
    shapes = {"x": x.shape, "y": call.y.shape, "z": (call.n_targets, n_rows, channels)}
    if weights is not None:
        shapes["weights"] = weights.shape
    return [x.new_empty(shapes[argument]) for argument in call.arguments.split()]


def gradient_of_partials(
    operation: Callable[..., list[Tensor]],
    names: Sequence[str],
    absent: Mapping[str, tuple[str, ...]],
    saved: SimpleNamespace,
    wanted: set[str],
    grads: list[Tensor | None],
) -> dict[str, Tensor]:
    """Differentiate partial derivatives of a form: they are others, with grads in their place.

    Args:
        operation: Returns partial derivatives of the form; what it takes is in ``saved``.
        names: The arguments of the form.
        absent: The arguments that the derivative by one of them has not in its terms.
        saved: The call that is differentiated.
        wanted: The inputs whose gradient is wanted.
        grads: Gradients of its outputs, None for one that nothing depends on.
    """
    fixed = {name: getattr(saved, name) for name in _FIXED}
    found: dict[str, Tensor] = {}
    for place, grad in zip(saved.arguments.split(), grads, strict=True):
        given = {name: getattr(saved, name) for name in names} | {place: grad}
        given |= dict.fromkeys(absent.get(place, ()))
        others = [
            name for name in names if name in wanted and name != place and given[name] is not None
        ]
        if grad is None or not others:
            continue
        partials = operation(**given, **fixed, arguments=" ".join(others))
        for name, partial in zip(others, partials, strict=True):
            found[name] = partial if name not in found else found[name] + partial
    return found


def _partials_gradient(
    saved: SimpleNamespace, wanted: set[str], grads: list[Tensor | None]
) -> dict[str, Tensor]:
    return gradient_of_partials(cg_partials, ARGUMENTS, {}, saved, wanted, grads)


@registered(outputs=_fake_partials, gradient=_partials_gradient)
def cg_partials(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    z: Tensor | None,
    ends: list[Tensor],
    segments: list[Tensor],
    n_targets: int,
    arguments: str,
    paths: Sequence[int],
    mode: str,
    stacked: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the partial derivatives of F by the named arguments, in the shapes of these.

    ``z`` may be missing where only its own derivative is asked for; ``ends`` is empty or has the
    sources and the targets; for ``segments`` see :func:`segments_for`.
    """
    form = form_from(paths, mode, stacked)
    wanted = tuple(arguments.split())
    return kernels_of("coupling", kernels).partials(
        x, y, weights, z, ends, segments, n_targets, wanted, form
    )


def form_from(paths: Sequence[int], mode: str, stacked: bool) -> Form:
    """Return the form from what an operation of a traced graph can carry."""
    numbers = iter(paths)
    triples = zip(numbers, numbers, numbers, strict=True)
    return Form(tuple(Path(*triple) for triple in triples), _mode(mode), stacked)


def _mode(name: str) -> Mode:
    return "uvu" if name == "uvu" else "uuu" if name == "uuu" else "uvw"
