"""How well groups of heads fit each other by what no map inside a head can change: their circuits.

A query and its key meet in `W_Q W_K^T`, a value and its output in `W_V W_O`; with rotary positions each plane has a
circuit of its own, one column of complex numbers times another. Their inner products need no [width, width] matrix:
`<Q_i K_i^T, Q_j K_j^T> = sum((Q_i^T Q_j) * (K_i^T K_j))`, entry by entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.assignment import score_of, solve_assignments
from jaxtune.align.products import pair_scores, query_pairs, slot_scores, unit_scores, unit_squares_of_slots
from jaxtune.errors import SpecError
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.element import Element
from jaxtune.symmetry.spec import Spec
from jaxtune.types import Leaf

PLANE_KINDS = ("rotary", "rotary_signs")


@dataclass(frozen=True)
class HeadLeaf:
    """One leaf with units of a head.

    Attributes:
        path: Where it lies.
        child: The group inside the head that owns its units.
        axes: Of the heads, of the queries (-1 where the leaf has none) and of the units.
        is_dual: Whether the units are on the dual side.
        by_plane: Whether the units are rotary planes.
    """

    path: str
    child: str
    axes: tuple[int, int, int]
    is_dual: bool
    by_plane: bool


def query_of(spec: Spec, head: str) -> str | None:
    """Name of the group of queries inside a head group, None where no group owns them."""
    return next((child for child in spec.children_of(head) if spec.groups[child].role == "query"), None)


def inside_of(spec: Spec, head: str) -> list[str]:
    """Names of the groups of units inside a head."""
    return [child for child in spec.children_of(head) if spec.groups[child].role != "query"]


def list_head_leaves(spec: Spec, head: str) -> list[HeadLeaf]:
    """Every leaf with units of a head, by the groups inside."""
    found = []
    for child in inside_of(spec, head):
        by_plane = spec.groups[child].kind in PLANE_KINDS
        for path, unit_axis in spec.leaves_of(child):
            axes = (*_axes_of(spec, head, path), unit_axis)
            found.append(HeadLeaf(path, child, axes, spec.axes[path][unit_axis].dual, by_plane))
    return found


def list_loose_leaves(spec: Spec, head: str) -> list[tuple[str, int, int]]:
    """(path, head axis, query axis or -1) of the leaves that hold one number, or one fixed row, a head or a query."""
    inside = {leaf.path for leaf in list_head_leaves(spec, head)}
    return [(path, *_axes_of(spec, head, path)) for path, _ in spec.leaves_of(head) if path not in inside]


def pair_tables(
    spec: Spec, head: str, element: Element, target: Mapping[str, Leaf], source: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Inner products of the units inside every pair of queries of every pair of heads; none of them is moved.

    Shapes:
        returns: path -> as `products.query_pairs`.
    """
    return {
        leaf.path: np.asarray(
            query_pairs(
                spec, element, leaf.path, leaf.axes, target[leaf.path], source[leaf.path], by_plane=leaf.by_plane
            )
        )
        for leaf in list_head_leaves(spec, head)
        if leaf.path not in spec.unmatched
    }


def circuit_norms(
    spec: Spec, head: str, target: Mapping[str, Leaf], source: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Norm of each target group's circuits times norm of each source group's, by group inside the head.

    Shapes:
        returns: child group -> float64[target heads, source heads].

    Raises:
        SpecError: QK and VO share one group of units inside the head, so there are no two circuits.
    """
    norms = {}
    for child in inside_of(spec, head):
        if spec.groups[child].role not in ("qk", "vo"):
            raise SpecError(f"group {child}: circuits need QK and VO in groups of their own, not one for both.")
        own = [own_products(spec, head, child, tree) for tree in (target, source)]
        # All queries of a head together: sum_a tr(Q_a^T Q_a K^T K).
        ours, theirs = (np.sqrt(np.maximum((a * b).reshape(len(a), -1).sum(axis=1), 0.0)) for a, b in own)
        norms[child] = np.maximum(ours[:, None] * theirs[None], np.finfo(np.float64).tiny)
    return norms


def own_products(
    spec: Spec, head: str, child: str, tree: Mapping[str, Leaf], weights: Mapping[str, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Products of one network's units inside each head, all queries together, over the plain and the dual leaves.

    Args:
        spec: Symmetry of the network.
        head, child: A group of heads and a group inside.
        tree: Path -> leaf.
        weights: Path -> factor of that leaf, leaves without one do not count; None: every matched leaf counts once.

    Shapes:
        returns: Gram matrices, float64[heads, n, n] each; of rotary planes squared norms, float64[heads, n/2].
    """
    size, units = spec.groups[head].size, spec.groups[child].size
    by_plane, still = spec.groups[child].kind in PLANE_KINDS, elements.identity(spec)
    sides = [np.zeros((size, units // 2) if by_plane else (size, units, units)) for _ in range(2)]
    for leaf in list_head_leaves(spec, head):
        weight = float(leaf.path not in spec.unmatched) if weights is None else weights.get(leaf.path, 0.0)
        if leaf.child != child or not weight:
            continue
        own, (head_axis, _, unit_axis) = tree[leaf.path], leaf.axes
        if by_plane:
            squares = np.asarray(unit_squares_of_slots(own, head_axis, unit_axis), np.float64)
            product = sum(np.split(squares, 2, axis=-1))
        else:
            product = np.asarray(slot_scores(spec, still, leaf.path, head_axis, unit_axis, own, own), np.float64)
        sides[leaf.is_dual] += weight * product
    return sides[0], sides[1]


def query_scores(spec: Spec, head: str, pairs: Mapping[str, np.ndarray], norms: Mapping[str, np.ndarray]) -> np.ndarray:
    """Cosine of the circuits, summed over the groups inside, for every pair of queries of every pair of heads.

    Args:
        spec: Symmetry of both networks.
        head: Name of the head group.
        pairs, norms: As `pair_tables` and `circuit_norms` give. A norm is of all queries of a head together, so
            scores of matched queries add up to the cosine of their heads.

    Shapes:
        returns: float64[target heads, source heads, target queries, source queries].
    """
    total = 0.0
    for child in inside_of(spec, head):
        sides = [_sum_pairs(spec, head, child, pairs, is_dual=is_dual) for is_dual in (False, True)]
        if any(side is None for side in sides):
            continue
        by_plane = spec.groups[child].kind in PLANE_KINDS
        products = np.asarray((_meet_planes if by_plane else _meet_units)(*sides), np.float64)
        total = total + products / norms[child][:, :, None, None]
    if np.ndim(total):
        return total
    queries = 1 if query_of(spec, head) is None else spec.groups[query_of(spec, head)].size
    return np.zeros((spec.groups[head].size,) * 2 + (queries,) * 2)


def circuit_scores(
    spec: Spec, head: str, element: Element, target: Mapping[str, Leaf], source: Mapping[str, Leaf]
) -> np.ndarray:
    """Sum of the cosines of the circuits inside, for every pair of heads, queries in the best order.

    Invariant under every map inside a head, of either network; needs the residual stream to be aligned, since the
    circuits live in it. Biases enter as one more row, as an input that is always 1; a key bias that softmax cannot
    see is left out.

    Args:
        spec: Symmetry of both networks.
        head: Name of the head group.
        element: Where the residual stream stands.
        target, source: Flat trees, path -> leaf.

    Shapes:
        returns: float64[target heads, source heads], within [-n, n] for n groups inside.

    Raises:
        SpecError: QK and VO share one group of units inside the head, so there are no two circuits.
    """
    norms = circuit_norms(spec, head, target, source)
    return match_queries(query_scores(spec, head, pair_tables(spec, head, element, target, source), norms))[0]


def match_queries(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(best sum for every pair of heads, the order of queries that reaches it).

    Shapes:
        scores: float[target heads, source heads, queries, queries].
        returns: float64[target heads, source heads]; int32[target heads, source heads, queries].
    """
    orders = solve_assignments(scores)
    return score_of(scores, orders), orders


def loose_scores(
    spec: Spec,
    head: str,
    element: Element,
    target: Mapping[str, Leaf],
    source: Mapping[str, Leaf],
    weights: Mapping[str, float],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Weighted inner products over the leaves without units, for every pair of heads and of queries inside them.

    Shapes:
        returns: float64[target heads, source heads], and float64[target heads, source heads, target queries,
            source queries], None where no leaf tells queries apart.
    """
    of_heads, of_queries = np.zeros((spec.groups[head].size,) * 2), None
    for path, head_axis, query_axis in list_loose_leaves(spec, head):
        if path not in weights:
            continue
        if query_axis < 0:
            product = unit_scores(spec, element, path, head_axis, target[path], source[path])
            of_heads += weights[path] * np.asarray(product, np.float64)
        else:
            table = pair_scores(spec, element, path, head_axis, query_axis, target[path], source[path])
            of_queries = (0.0 if of_queries is None else of_queries) + weights[path] * np.asarray(table, np.float64)
    return of_heads, of_queries


def _axes_of(spec, head, path):
    """Positions of the heads and of the queries, -1 without, on one leaf."""
    owners = [axis.group if axis else None for axis in spec.axes[path]]
    query = query_of(spec, head)
    return owners.index(head), owners.index(query) if query in owners and query is not None else -1


def _sum_pairs(spec, head, child, pairs, *, is_dual):
    """The tables of one side of a circuit added up, None where the side has no leaf."""
    total = None
    for leaf in list_head_leaves(spec, head):
        if leaf.child == child and leaf.is_dual == is_dual and leaf.path in pairs:
            total = pairs[leaf.path] if total is None else total + pairs[leaf.path]
    return total


@jax.jit
def _meet_units(plain, dual):
    return jnp.sum(plain * dual, axis=(4, 5))


@jax.jit
def _meet_planes(plain, dual):
    """`Re` of one column's product times the conjugate of the other's, summed over planes."""
    return jnp.sum(plain.real * dual.real + plain.imag * dual.imag, axis=4)
