"""Scores of one group's units, kept between visits: only what has moved since is multiplied again.

For orders alone. What another group's order does to a leaf is a gather of its columns, so a change of a few
positions changes the scores by a product with those few columns.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import SpecError
from jaxtune.symmetry.element import Element, apply_to_leaf
from jaxtune.symmetry.spec import Spec
from jaxtune.types import Leaf

# Scores of larger groups are made anew at each visit: twelve of 3072 units would take half a gigabyte.
MAX_KEPT_UNITS = 1024
# Shares of a leaf's columns that a change is padded to, so that a handful of programs serves every change.
PADDED_SHARES = (16, 4, 1)


class UnitTable:
    """`sum over leaves of <target unit i, source unit j>` of one group, its leaves' other axes moved by an element."""

    def __init__(self, spec: Spec, name: str, target: dict[str, Leaf], source: dict[str, Leaf]):
        self.spec, self.size = spec, spec.groups[name].size
        self.leaves = {path: (axis, target[path], source[path]) for path, axis in spec.leaves_of(name)}
        # Made before the search fills memory with passing products, between which small ones would lie scattered.
        self._kept = np.zeros((self.size, self.size), np.float32) if self.size <= MAX_KEPT_UNITS else None
        self._columns = {}

    def scores(self, element: Element, paths: tuple[str, ...]) -> np.ndarray:
        """Scores over the leaves `paths`; more of them than at the last visit, never fewer.

        Shapes:
            returns: float32[n, n], to be read only.
        """
        columns = {path: self._columns_of(element, path) for path in paths}
        new = [path for path in paths if path not in self._columns]
        scores = self._kept if self._columns else None
        if new:
            scores = self._add_new(scores, new, columns)
        for path in self._columns:
            axis, target, source = self.leaves[path]
            changed = np.flatnonzero(columns[path] != self._columns[path])
            if len(changed):
                where = self._pad(changed, columns[path], self._columns[path])
                scores = _add_change(scores, target, source, *where, axis=axis)
        scores = np.asarray(scores)
        if self._kept is None:
            return scores
        np.copyto(self._kept, scores)
        self._columns = columns
        return self._kept

    def _columns_of(self, element, path):
        """int32[columns]: the source column that lands at each column of the leaf, the unit axis taken out."""
        axis, target, _ = self.leaves[path]
        shape = [1 if a == axis else n for a, n in enumerate(target.shape)]
        columns = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        return apply_to_leaf(self.spec, element, path, columns, skip_axes=(axis,)).ravel()

    def _add_new(self, scores, paths, columns):
        axes, targets, sources = zip(*(self.leaves[path] for path in paths), strict=True)
        return _add_products(scores, targets, sources, [columns[path] for path in paths], axes=axes)

    @staticmethod
    def _pad(changed, new, old):
        """Positions of changed columns, what lands there now and what did, filled up to one of few lengths."""
        length = next(n for share in PADDED_SHARES if (n := -(-len(new) // share)) >= len(changed))
        rest = (0, length - len(changed))  # column 0 for column 0 is no change
        return [np.pad(values, rest).astype(np.int32) for values in (changed, new[changed], old[changed])]


def check_orders(spec: Spec) -> None:
    """Raises `SpecError` where a group is more than an order of units."""
    other = [f"{name} ({group.kind})" for name, group in spec.groups.items() if group.kind != "permutation"]
    if other:
        raise SpecError(f"TransFusion matches orders of units, and these groups are more: {', '.join(other)}.")


def _units_first(leaf, axis):
    moved = jnp.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1)
    return moved.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _dot(rows, columns):
    return jnp.einsum("ix,jx->ij", rows, columns, precision=jax.lax.Precision.HIGHEST).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="axes", donate_argnames="scores")
def _add_products(scores, targets, sources, columns, *, axes: tuple[int, ...]):
    """All leaves side by side, so that one product does and no second matrix of scores is made."""
    rows = [_units_first(leaf, axis) for leaf, axis in zip(targets, axes, strict=True)]
    moved = [_units_first(leaf, axis)[:, c] for leaf, axis, c in zip(sources, axes, columns, strict=True)]
    product = _dot(jnp.concatenate(rows, axis=1), jnp.concatenate(moved, axis=1))
    return product if scores is None else scores + product


@functools.partial(jax.jit, static_argnames="axis", donate_argnames="scores")
def _add_change(scores, target, source, changed, new, old, *, axis: int):
    source = _units_first(source, axis)
    return scores + _dot(_units_first(target, axis)[:, changed], source[:, new] - source[:, old])
