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

from atomeq.ops.coupling.clebsch_gordan import Form, form_from
from atomeq.ops.edge.frame import segments_of
from atomeq.ops.registration import WANT_SEGMENTS, kernel

ARGUMENTS = ("x", "y", "weights", "z")
FIXED = ("edges", "n_targets", "form", "kernels")


def couple(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    ends: Sequence[Tensor],
    n_targets: int,
    form: Form,
    kernels: str,
) -> Tensor:
    """Return dF/dz: the product, gathered by and summed over ends if there are any.

    Args:
        x: (n_sources, n1, U).
        y: (n_edges, n2), or (n_edges, n2, channels).
        weights: ([n_edges,] n_paths, ...); None for weights of 1.
        ends: Source and target of each edge; empty if x and the result belong to the edges.
        n_targets: Number of targets.
        form: What is coupled.
        kernels: Name of the kernels.

    Returns:
        (n_targets, rows, channels).
    """
    edges = sorted_edges(x, ends, n_targets, kernels)
    (product,) = cg_partials(x, y, weights, None, edges, n_targets, "z", form.code, kernels)
    return product


def sorted_edges(x: Tensor, ends: Sequence[Tensor], n_targets: int, kernels: str) -> list[Tensor]:
    """Return the ends of edges and, if the kernels want that, what sorts them.

    That is where each target's edges start in a sorted list (n_targets + 1,) and that list
    (n_edges,), then the same of the sources if x requires a gradient: made once for the product and
    all its derivatives.
    """
    edges = [end.contiguous() for end in ends]
    if not edges or kernels not in WANT_SEGMENTS:
        return edges
    edges += segments_of(edges[1], n_targets)
    if x.requires_grad:  # only the derivative by x sums on the sources
        edges += segments_of(edges[0], x.shape[0])
    return edges


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
    fixed = {name: getattr(saved, name) for name in FIXED}
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


def _fake_partials(call: SimpleNamespace) -> list[Tensor]:
    x, weights, form = call.x, call.weights, form_from(call.form)
    channels = weights.shape[-1] if weights is not None and form.mode == "uvw" else x.shape[-1]
    shapes = {"x": x.shape, "y": call.y.shape, "z": (call.n_targets, form.n_rows, channels)}
    if weights is not None:
        shapes["weights"] = weights.shape
    return [x.new_empty(shapes[argument]) for argument in call.arguments.split()]


def _partials_gradient(
    saved: SimpleNamespace, wanted: set[str], grads: list[Tensor | None]
) -> dict[str, Tensor]:
    return gradient_of_partials(cg_partials, ARGUMENTS, {}, saved, wanted, grads)


@kernel(outputs=_fake_partials, gradient=_partials_gradient)
def cg_partials(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    z: Tensor | None,
    edges: list[Tensor],
    n_targets: int,
    arguments: str,
    form: str,
    kernels: str,
) -> list[Tensor]:
    """Return the partial derivatives of F by the named arguments, in the shapes of these.

    ``x`` is (n_sources, n1, U), ``y`` (n_edges, n2) or (n_edges, n2, channels), ``weights``
    ([n_edges,] n_paths, ...) or None for weights of 1, ``z`` (n_targets, rows, channels) or None if
    the only argument is z. For ``edges`` see :func:`sorted_edges`; empty, x and z belong to the
    edges. Rows of x or y that no path reads get zeros.
    """
    ...
