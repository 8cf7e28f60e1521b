"""How well one network's attention heads fit another's: scores for orders of units inside, one table each.

spectral   distance of singular values; blind to any basis, so usable before anything else is known,
           but nearly equal for all heads of a random network (TransFusion)
exact      best inner product over all orders of the units inside; the objective itself

A third, blind to any map inside the head, is in `align.circuits`.
"""

from collections.abc import Mapping

import numpy as np

from jaxtune.align.assignment import score_of, solve_assignments
from jaxtune.align.circuits import list_head_leaves
from jaxtune.align.products import pair_scores
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
    """(path, head axis, unit axis) of every leaf with units of a head; queries are no units."""
    return [(leaf.path, leaf.axes[0], leaf.axes[2]) for leaf in list_head_leaves(spec, head)]
