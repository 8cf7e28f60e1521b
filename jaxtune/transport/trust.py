"""Trust weights: a moved task vector counts less where the aligned bases agree less."""

import math
from typing import Any

import numpy as np

from jaxtune.align.evidence import block_of
from jaxtune.errors import ConfigError
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.element import Element
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import flatten, is_float, map_leaves
from jaxtune.types import Params


def check_trust(trust: float) -> None:
    """Raises `ConfigError` unless `trust` is a finite number of at least 0."""
    if not (math.isfinite(trust) and trust >= 0):
        raise ConfigError(f"trust={trust!r}: expected a finite power of at least 0; 0 carries every block whole.")


def weigh_by_trust(
    spec: Spec, element: Element, task_vector: Params, target: Params, source: Params, *, trust: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """Multiplies each block of a moved task vector by `clip(cos(g(source), target), 0, 1) ** trust`.

    A block and not a leaf: a bias alone has too few entries for a cosine, and the kernels of one attention are
    wrong together. Leaves that say nothing about the match (`spec.unmatched`) do not enter the cosine and move
    with their block; a block of zeros says nothing either and is carried whole.

    Args:
        spec: Symmetry of the trees.
        element: What an alignment found.
        task_vector: What the element moved already.
        target, source: The two bases; the source as it was before the element.
        trust: Power of the cosine. 0: everything is carried whole, bit for bit.

    Returns:
        The weighed task vector in its own dtypes, and block -> factor (empty where `trust` is 0).

    Raises:
        ConfigError: `trust` is negative or not finite.

    Reference:
        This project. On planted pairs it pays only where the alignment itself is poor: with noise of 2 standard
        deviations `full` moves a task vector with a relative error of 1.11, 0.95 and 0.91 at trust 0, 0.5 and 1,
        but with 0.3 an exact permutation goes from 0 to 0.02 and 0.04. So the default is 0.
    """
    check_trust(trust)
    if trust == 0:
        return map_leaves(lambda _, leaf: leaf, task_vector), {}
    sums: dict[str, np.ndarray] = {}
    moved_leaves = flatten(elements.apply(spec, element, source))
    for path, leaf in flatten(target).items():
        if is_float(leaf) and path not in spec.unmatched:
            ours, theirs = (np.asarray(x, np.float64).ravel() for x in (leaf, moved_leaves[path]))
            row = np.array([ours @ theirs, ours @ ours, theirs @ theirs])
            sums[block_of(path)] = sums.get(block_of(path), 0.0) + row
    factors = {block: _cosine(*row) ** trust for block, row in sums.items()}

    def weigh(path, leaf):
        factor = factors.get(block_of(path), 1.0)
        return (leaf * np.asarray(factor, leaf.dtype)).astype(leaf.dtype) if is_float(leaf) else leaf

    return map_leaves(weigh, task_vector), factors


def _cosine(product, ours, theirs):
    return float(np.clip(product / np.sqrt(ours * theirs), 0.0, 1.0)) if ours and theirs else 1.0
