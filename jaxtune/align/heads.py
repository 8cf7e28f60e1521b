"""How well one network's attention heads fit another's: three scores, one table each.

spectral   distance of singular values; blind to any basis, so usable before anything else is known,
           but nearly equal for all heads of a random network (TransFusion)
exact      best inner product over all orders of the units inside; the objective itself
circuit    cosine of W_Q W_K^T and of W_V W_O; blind to any invertible map inside the head
"""

from collections.abc import Mapping

import numpy as np

from jaxtune.align.assignment import score_of, solve_assignments
from jaxtune.align.products import pair_scores
from jaxtune.errors import SpecError
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.element import Element
from jaxtune.symmetry.spec import Spec
from jaxtune.types import Leaf


def head_spectra(leaf: Leaf, head_axis: int, unit_axis: int) -> np.ndarray:
    """Singular values of each head's matrix (its units against everything else), descending.

    Shapes:
        leaf: float[..., heads, ..., units, ...].
        returns: float64[heads, units].

    Through the units x units Gram matrix in float64: about ten times faster than an SVD of a
    [units, width] matrix, at a relative error of 1e-8 of the largest value.
    """
    by_head = np.moveaxis(np.asarray(leaf, np.float64), (head_axis, unit_axis), (0, 1))
    by_head = by_head.reshape(*by_head.shape[:2], -1)
    squares = np.linalg.eigvalsh(by_head @ by_head.transpose(0, 2, 1))
    return np.sqrt(np.maximum(squares[:, ::-1], 0.0))


def spectral_scores(
    spec: Spec, head: str, target: Mapping[str, Leaf], source: Mapping[str, Leaf], *, include_output: bool = True
) -> np.ndarray:
    """Minus the distance of singular values, summed over the kernels of a head.

    Args:
        spec: Symmetry of both networks.
        head: Name of the head group.
        target, source: Flat trees, path -> leaf.
        include_output: Whether the output projection counts. The TransFusion paper sums over Q, K, V;
            its code adds the output.

    Shapes:
        returns: float64[target heads, source heads]; higher fits better.

    Reference:
        Rinaldi et al. 2025, arXiv:2505.22697, section 3.2. No permutation changes these numbers, so one
        call serves a whole search.
    """
    total = np.zeros((spec.groups[head].size,) * 2)
    for path, head_axis, unit_axis in head_leaves(spec, head):
        if len(spec.axes[path]) < 3 or path in spec.unmatched:  # biases have no spectrum
            continue
        if not include_output and head_axis == 0:  # [heads, units, width] writes; [width, heads, units] reads
            continue
        ours = head_spectra(target[path], head_axis, unit_axis)
        theirs = head_spectra(source[path], head_axis, unit_axis)
        total -= np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
    return total


def exact_scores(inside: Mapping[str, np.ndarray]) -> np.ndarray:
    """Best sum of inner products over the orders of the units inside, for every pair of heads.

    Args:
        inside: Group inside the head -> float[heads, heads, units, units], as `inside_scores` gives.

    Shapes:
        returns: float64[target heads, source heads].
    """
    return sum(score_of(scores, solve_assignments(scores)) for scores in inside.values())


def circuit_scores(
    spec: Spec,
    head: str,
    element: Element,
    target: Mapping[str, Leaf],
    source: Mapping[str, Leaf],
    *,
    norms: Mapping[str, np.ndarray] | None = None,
    pairs: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Cosine of the QK circuit plus cosine of the VO circuit, for every pair of heads.

    Invariant under every invertible map inside a head, of either network; needs the residual stream to
    be aligned, since the circuits live in it. Never forms a [width, width] matrix:
    `<Q_i K_i^T, Q_j K_j^T> = sum((Q_i^T Q_j) * (K_i^T K_j))`. The query and value biases enter as one
    more row, as an input that is always 1; the key bias is invisible to softmax and left out.

    Args:
        spec: Symmetry of both networks.
        head: Name of the head group.
        element: Where the residual stream stands.
        target, source: Flat trees, path -> leaf.
        norms: Of the circuits, as `circuit_norms` gives; no element changes them, so one call serves a search.
        pairs: As `pair_tables` gives, where the caller has them already.

    Shapes:
        returns: float64[target heads, source heads], within [-n, n] for n groups inside.

    Raises:
        SpecError: QK and VO share one group of units inside the head, so there are no two circuits.
    """
    norms = norms or circuit_norms(spec, head, target, source)
    pairs = pairs or pair_tables(spec, head, element, target, source)
    total = np.zeros((spec.groups[head].size,) * 2)
    for child in spec.children_of(head):
        total += _circuit_products(spec, child, pairs) / norms[child]
    return total


def pair_tables(
    spec: Spec, head: str, element: Element, target: Mapping[str, Leaf], source: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Inner products of the units inside every pair of heads, leaf by leaf; neither heads nor units are moved.

    Shapes:
        returns: path -> float32[target heads, source heads, units, units].
    """
    return {
        path: np.asarray(pair_scores(spec, element, path, head_axis, unit_axis, target[path], source[path]))
        for path, head_axis, unit_axis in head_leaves(spec, head)
        if path not in spec.unmatched
    }


def circuit_norms(
    spec: Spec, head: str, target: Mapping[str, Leaf], source: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Norm of each target circuit times norm of each source circuit, by group inside the head.

    Shapes:
        returns: child group -> float64[target heads, source heads].

    Raises:
        SpecError: QK and VO share one group of units inside the head, so there are no two circuits.
    """
    norms, still = {}, elements.identity(spec)
    own = [pair_tables(spec, head, still, tree, tree) for tree in (target, source)]
    for child in spec.children_of(head):
        if spec.groups[child].role not in ("qk", "vo"):
            raise SpecError(f"group {child}: circuits need QK and VO in groups of their own, not one for both.")
        ours, theirs = (np.sqrt(np.maximum(np.diag(_circuit_products(spec, child, pairs)), 0.0)) for pairs in own)
        norms[child] = np.maximum(ours[:, None] * theirs[None], np.finfo(np.float64).tiny)
    return norms


def _circuit_products(spec, child, pairs):
    """Inner products of the circuits of every pair of heads."""
    sides = {False: 0.0, True: 0.0}
    for path, unit_axis in spec.leaves_of(child):
        if path in pairs:
            sides[spec.axes[path][unit_axis].dual] += pairs[path].astype(np.float64)
    return (sides[False] * sides[True]).sum(axis=(2, 3))


def inside_scores(
    spec: Spec,
    head: str,
    element: Element,
    target: Mapping[str, Leaf],
    source: Mapping[str, Leaf],
    weights: Mapping[str, float],
) -> dict[str, np.ndarray]:
    """Inner products of the units inside every pair of heads, by group inside.

    Args:
        weights: Path -> factor of that leaf; leaves without one do not count.

    Shapes:
        returns: child group -> float64[target heads, source heads, units, units].
    """
    inside = {}
    for path, head_axis, unit_axis in head_leaves(spec, head):
        if path in weights:
            child = spec.axes[path][unit_axis].group
            scores = pair_scores(spec, element, path, head_axis, unit_axis, target[path], source[path])
            inside[child] = inside.get(child, 0.0) + weights[path] * np.asarray(scores, np.float64)
    size = spec.groups[head].size
    for child in spec.children_of(head):
        units = spec.groups[child].size
        inside.setdefault(child, np.zeros((size, size, units, units)))
    return inside


def head_leaves(spec: Spec, head: str) -> list[tuple[str, int, int]]:
    """(path, head axis, unit axis) of every leaf with units of a head."""
    found = []
    for child in spec.children_of(head):
        for path, unit_axis in spec.leaves_of(child):
            owners = [axis.group if axis else None for axis in spec.axes[path]]
            found.append((path, owners.index(head), unit_axis))
    return found
