"""Rotations that correct an element site by site: each side of a matrix its own, or those of one block together."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.align.bases import polar_factor
from jaxtune.align.evidence import block_of
from jaxtune.symmetry.spec import Spec
from jaxtune.transport.folded_moments import Table
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Params

# (path of a matrix, whether its inputs) -> rotation of that side's axes taken as one.
SiteMaps = Mapping[tuple[str, bool], np.ndarray]


def fit_site_maps(
    spec: Spec, tables: list[Table], moved: list[np.ndarray], *, tie: str, num_examples: int, prior: float
) -> tuple[dict[tuple[str, bool], np.ndarray], dict[str, np.ndarray]]:
    """`polar(n C + prior I)` of every side of every matrix, C the correlation of what an element has moved already.

    Args:
        spec: Of the folded weights.
        tables: Both sides of the matrices.
        moved: Their cross-moments, the source's units where the element puts them.
        tie: "site": nothing shared. "block": sides of one block with the same owners share a rotation.
        num_examples, prior: What activations and the element count.

    Returns:
        (rotations of the sides, rotation of each stream for leaves that are no matrix).
    """
    shares: dict[Any, list[np.ndarray]] = {}
    keys, streams = {}, {}
    for table, cross in zip(tables, moved, strict=True):
        owners = tuple(axis.group if axis else None for axis in table.axes)
        where = (table.path, table.is_input)
        keys[where] = (block_of(table.path), owners) if tie == "block" else where
        size = cross.shape[-1]
        ours, theirs = table.energies
        # An invertible map inside heads has changed the source's energy into the target's.
        is_inside = any(owner and spec.groups[owner].kind == "general_linear" for owner in owners)
        correlation = cross.reshape(size, size) * size / (theirs if is_inside else np.sqrt(ours * theirs))
        shares.setdefault(keys[where], []).append(correlation)
        if len(owners) == 1 and owners[0] and spec.groups[owners[0]].role == "stream":
            streams.setdefault(owners[0], []).append(correlation)

    def fit(scores):
        return polar_factor(num_examples * np.mean(scores, axis=0) + prior * np.eye(len(scores[0])))

    rotations = {key: fit(scores) for key, scores in shares.items()}
    return {where: rotations[key] for where, key in keys.items()}, {
        name: fit(scores) for name, scores in streams.items()
    }


def turn(
    spec: Spec, change: Params, tables: list[Table], maps: SiteMaps, streams: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """A change of folded weights, every side of every matrix turned by its map.

    A bias turns with what its matrix makes; tables and tokens with the stream as a whole.
    """
    leaves = flatten(change)
    places = {(table.path, table.is_input): table.places for table in tables}
    result = {}
    for path, leaf in leaves.items():
        turned = np.asarray(leaf, np.float64)
        mine = [(places[path, side], maps[path, side]) for side in (True, False) if (path, side) in maps]
        kernel = f"{path.rpartition('/')[0]}/kernel"
        if not mine and path.endswith("/bias") and (kernel, False) in maps:
            mine = [(tuple(range(leaf.ndim)), maps[kernel, False])]
        elif not mine and path in spec.axes:
            mine = [
                ((place,), streams[axis.group])
                for place, axis in enumerate(spec.axes[path])
                if axis is not None and axis.group in streams
            ]
        for axes, rotation in mine:
            turned = _turn(turned, axes, rotation)
        result[path] = turned.astype(leaf.dtype)
    return unflatten(result)


def _turn(leaf, axes, rotation):
    """`sum_i leaf[i] R[i, j]` over some axes taken as one."""
    order = (*(axis for axis in range(leaf.ndim) if axis not in axes), *axes)
    last = leaf.transpose(order)
    turned = (last.reshape(*last.shape[: leaf.ndim - len(axes)], -1) @ rotation).reshape(last.shape)
    return turned.transpose(np.argsort(order))
