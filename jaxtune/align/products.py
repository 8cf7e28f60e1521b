"""Inner products between the units of two networks: the numbers that every assignment is solved on.

Units of the target are rows, units of the source columns. The source's *other* axes are moved by the
element found so far before the product, so a score says how well a unit fits given everything else.
The arithmetic is jitted and keyed by the layout of a leaf, not by its path: all blocks of a
transformer share a handful of compiled programs.
"""

import functools
import threading
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.symmetry.element import Element, apply_to_leaf
from jaxtune.symmetry.monomial import factors_of, order_of
from jaxtune.symmetry.rotary import both_halves, side_of
from jaxtune.symmetry.spec import Spec
from jaxtune.types import Leaf

# Of a leaf in float32 that is handed over at once, where it can be cut.
PART_BYTES = 1 << 26
# Of all leaves in float32 that are laid side by side.
STACK_BYTES = 1 << 25
# A product of stacks keeps all cores busy by itself: of two side by side, one waits, and has not used memory yet.
_ONE_AT_A_TIME = threading.Lock()


def unit_scores(spec: Spec, element: Element, path: str, axis: int, target: Leaf, source: Leaf) -> jax.Array:
    """Inner products of every target unit with every source unit along one axis of one leaf.

    Shapes:
        target, source: the leaf at `path` in both networks, float[..., n, ...].
        returns: float32[n, n].
    """
    layout, values = _layout_of(spec, element, path, skip=(axis,))
    return _unit_scores(target, source, values, layout=layout, axis=axis)


def add_unit_scores(
    scores: jax.Array | None,
    weight: float,
    spec: Spec,
    element: Element,
    path: str,
    axis: int,
    target: Leaf,
    source: Leaf,
) -> jax.Array:
    """`scores + weight * unit_scores(...)` in the place of `scores`, which is gone afterwards; None is zeros.

    A large leaf goes through part by part along an axis that nothing moves, as an embedding has one for its tokens.
    """
    layout, values = _layout_of(spec, element, path, skip=(axis,))
    fixed = next((a for a, entry in enumerate(layout) if entry is None and a != axis), None)
    length = 1 if fixed is None else target.shape[fixed]
    num_parts = 1 if fixed is None else min(length, -(-4 * target.size // PART_BYTES))
    step = -(-length // max(num_parts, 1))
    for start in range(0, max(length, 1), max(step, 1)):
        whole = fixed is None or step >= length
        part = () if whole else (slice(None),) * fixed + (slice(start, start + step),)
        pair = (target, source) if whole else (target[part], source[part])
        scores = _add_unit_scores(scores, np.float32(weight), *pair, values, layout=layout, axis=axis)
        if not whole:
            scores.block_until_ready()  # before the next part is handed over
    return scores


def sum_unit_scores(
    spec: Spec, element: Element, leaves: Iterable[tuple[float, str, int, Leaf, Leaf]]
) -> jax.Array | None:
    """`sum of weight * unit_scores(...)`, made so that few matrices of scores are in memory at a time.

    Small leaves are laid side by side, so that one product does for all of them; large ones go by themselves.

    Args:
        leaves: Weight, path, unit axis, target and source of each, read as they are needed.

    Shapes:
        returns: float32[n, n]; None without leaves.
    """
    scores, small, num_bytes = None, [], 0
    for weight, path, axis, target, source in leaves:
        if 4 * target.size > STACK_BYTES:
            scores = add_unit_scores(scores, weight, spec, element, path, axis, target, source)
            continue
        if num_bytes + 4 * target.size > STACK_BYTES:
            scores, small, num_bytes = _add_stack(scores, spec, element, small), [], 0
        small.append((weight, path, axis, target, source))
        num_bytes += 4 * target.size
    return _add_stack(scores, spec, element, small) if small else scores


def _add_stack(scores, spec, element, leaves):
    is_wide = any(np.float64 in (target.dtype, source.dtype) for *_, target, source in leaves)
    _, _, axis, target, _ = leaves[0]
    size, start = target.shape[axis], 0
    shape = size, sum(leaf[3].size for leaf in leaves) // size
    with _ONE_AT_A_TIME:
        rows, columns = (jnp.zeros(shape, np.float64 if is_wide else np.float32) for _ in range(2))
        for weight, path, axis, target, source in leaves:
            layout, values = _layout_of(spec, element, path, skip=(axis,))
            still = (None,) * len(layout)
            rows = _put_units(rows, target, (), np.float32(weight), start, layout=still, axis=axis)
            columns = _put_units(columns, source, values, np.float32(1), start, layout=layout, axis=axis)
            jax.block_until_ready((rows, columns))  # before the next leaf is handed over
            start += target.size // size
        return _add_product(scores, rows, columns).block_until_ready()


def slot_scores(
    spec: Spec, element: Element, path: str, parent_axis: int, axis: int, target: Leaf, source: Leaf
) -> jax.Array:
    """The same inside each pair of matched parents (heads), which the element has already matched.

    Shapes:
        returns: float32[parents, n, n].
    """
    layout, values = _layout_of(spec, element, path, skip=(axis,))
    return _slot_scores(target, source, values, layout=layout, parent_axis=parent_axis, axis=axis)


def pair_scores(
    spec: Spec, element: Element, path: str, parent_axis: int, axis: int, target: Leaf, source: Leaf
) -> jax.Array:
    """The same inside every pair of parents, matched or not.

    Shapes:
        returns: float32[target parents, source parents, n, n].
    """
    layout, values = _layout_of(spec, element, path, skip=(parent_axis, axis))
    return _pair_scores(target, source, values, layout=layout, parent_axis=parent_axis, axis=axis)


def query_pairs(
    spec: Spec,
    element: Element,
    path: str,
    axes: tuple[int, int, int],
    target: Leaf,
    source: Leaf,
    *,
    by_plane: bool = False,
) -> jax.Array:
    """The same for every pair of queries inside every pair of heads; neither heads, queries nor units are moved.

    Args:
        axes: Of the heads, of the queries (-1 where the leaf has none) and of the units.
        by_plane: Whether the units are rotary planes: then entry i + n/2 is the imaginary part of entry i, and
            what comes back is the product `sum conj(target) source` of each plane with its like.

    Shapes:
        returns: float32[target heads, source heads, target queries, source queries, n, n], or
            complex64[target heads, source heads, target queries, source queries, n/2]; queries 1 without an axis.
    """
    layout, values = _layout_of(spec, element, path, skip=axes)
    product = _plane_pairs if by_plane else _query_pairs
    return product(target, source, values, layout=layout, axes=axes)


def unit_squares_of_slots(leaf: Leaf, parent_axis: int, axis: int) -> jax.Array:
    """Squared norms of the units inside each parent: float32[parents, n]."""
    return _unit_squares_of_slots(leaf, parent_axis=parent_axis, axis=axis)


def add_scores_of_slot(
    scores: jax.Array | None,
    weight: float,
    spec: Spec,
    element: Element,
    path: str,
    axes: tuple[int, int],
    target: Leaf,
    source: Leaf,
) -> jax.Array:
    """`add_unit_scores` inside one pair of matched parents.

    Args:
        axes: Of the parents, which `target` and `source` no longer have, and of the units in the whole leaf.
        target, source: The parts of the leaf that belong to the two parents.
    """
    layout, values, axis = _layout_of_slot(spec, element, path, axes)
    return _add_unit_scores(scores, np.float32(weight), target, source, values, layout=layout, axis=axis)


def units_of_slot(
    spec: Spec, element: Element, path: str, axes: tuple[int, int], part: Leaf, *, is_moved: bool
) -> jax.Array:
    """One parent's part of a leaf with its units first and all else behind: float32[n, rest].

    Args:
        axes, part: As in `add_scores_of_slot`.
        is_moved: Whether the other axes are moved by the element.
    """
    layout, values, axis = _layout_of_slot(spec, element, path, axes)
    if not is_moved:
        layout, values = (None,) * len(layout), ()
    return _units_of_slot(part, values, layout=layout, axis=axis)


def _layout_of_slot(spec, element, path, axes):
    """(layout, values, unit axis) of a leaf that has lost the axis of its parents."""
    parent_axis, axis = axes
    layout, values = _layout_of(spec, element, path, skip=axes)
    layout = tuple(entry for position, entry in enumerate(layout) if position != parent_axis)
    return layout, values, axis - (parent_axis < axis)


def leaf_product(spec: Spec, element: Element, path: str, target: Leaf, source: Leaf) -> tuple[float, float]:
    """`<target, g(source)>` and `<g(source), g(source)>` over one leaf."""
    is_ordered = all(axis is None or spec.groups[axis.group].kind == "permutation" for axis in spec.axes[path])
    if is_ordered and isinstance(target, np.ndarray) and isinstance(source, np.ndarray):
        # On the host, where both are: a gather and two sums cost less than handing the leaves to a device.
        moved = apply_to_leaf(spec, element, path, source)
        target, moved = (leaf.astype(np.promote_types(leaf.dtype, np.float32), copy=False) for leaf in (target, moved))
        return float(np.vdot(target, moved)), float(np.vdot(moved, moved))
    layout, values = _layout_of(spec, element, path, skip=())
    product, square = _leaf_product(target, source, values, layout=layout)
    return float(product), float(square)


# One entry per axis of a leaf: None where nothing moves, else how it moves ("take", "scale", "sign", "spin" or "turn")
# and the axis of the parent, -1 without one.
Layout = tuple[tuple[str, int] | None, ...]


def _layout_of(spec, element, path, *, skip):
    layout, values = [], []
    owners = [axis.group if axis else None for axis in spec.axes[path]]
    for position, (owner, axis) in enumerate(zip(owners, spec.axes[path], strict=True)):
        if owner is None or position in skip:
            layout.append(None)
            continue
        group = spec.groups[owner]
        parent_axis = -1 if group.parent is None else owners.index(group.parent)
        if group.kind == "permutation":
            layout.append(("take", parent_axis))
            values.append(np.asarray(element[owner], np.int32))
        elif group.kind in ("signed_permutation", "scaled_permutation"):
            factors = factors_of(element[owner], dual=axis.dual).astype(np.float32)
            layout.append(("scale", parent_axis))
            values.append((order_of(element[owner]), np.ones_like(factors) if axis.order_only else factors))
        elif group.kind == "rotary_signs":
            layout.append(("sign", parent_axis))
            values.append(both_halves(element[owner]).astype(np.float32))
        elif group.kind == "rotary":
            layout.append(("spin", parent_axis))
            numbers = side_of(element[owner], dual=axis.dual)
            values.append((numbers.real.astype(np.float32), numbers.imag.astype(np.float32)))
        else:
            matrix = np.asarray(element[owner])
            if axis.dual and group.kind == "general_linear":
                matrix = np.swapaxes(np.linalg.inv(matrix), -1, -2)
            layout.append(("turn", parent_axis))
            values.append(matrix.astype(np.float32))
    return tuple(layout), tuple(values)


def _move(leaf, values, layout):
    values = dict(zip([a for a, entry in enumerate(layout) if entry is not None], values, strict=True))
    for axis in sorted(values, key=lambda axis: layout[axis][1] >= 0):  # parents first
        (how, parent_axis), value = layout[axis], values[axis]
        if how == "turn":
            letters = "abcdefgh"[: leaf.ndim]
            inner = letters[axis] + "z"
            matrix = inner if parent_axis < 0 else letters[parent_axis] + inner
            leaf = _einsum(leaf, value.astype(leaf.dtype), f"{letters},{matrix}->{letters.replace(letters[axis], 'z')}")
        elif how == "scale":
            order, factors = value
            leaf = _take(leaf, order, axis, parent_axis) * _spread(factors.astype(leaf.dtype), leaf, axis, parent_axis)
        elif how == "sign":
            leaf = leaf * _spread(value.astype(leaf.dtype), leaf, axis, parent_axis)
        elif how == "spin":
            x, y = jnp.split(leaf, 2, axis=axis)
            re, im = (_spread(part.astype(leaf.dtype), x, axis, parent_axis) for part in value)
            leaf = jnp.concatenate([x * re - y * im, x * im + y * re], axis=axis)
        else:
            leaf = _take(leaf, value, axis, parent_axis)
    return leaf


def _take(leaf, order, axis, parent_axis):
    if parent_axis < 0:
        return jnp.take(leaf, order, axis=axis, mode="clip")  # an order is never out of bounds, and this is faster
    return jnp.take_along_axis(leaf, _spread(order, leaf, axis, parent_axis), axis=axis, mode="clip")


def _spread(values, leaf, axis, parent_axis):
    """One value per unit (and parent), laid along the axes of a leaf: length 1 elsewhere."""
    values = values if parent_axis < axis else values.T
    return values.reshape([leaf.shape[a] if a in (axis, parent_axis) else 1 for a in range(leaf.ndim)])


def _moved_pair(target, source, values, layout):
    wide = jnp.float64 if jnp.float64 in (target.dtype, source.dtype) else jnp.float32
    return target.astype(wide), _move(source.astype(wide), values, layout)


def _einsum(a, b, formula):
    return jnp.einsum(formula, a, b, precision=jax.lax.Precision.HIGHEST)


def _units_first(leaf, axis):
    return jnp.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1)


@functools.partial(jax.jit, static_argnames=("layout", "axis"))
def _unit_scores(target, source, values, *, layout: Layout, axis: int):
    target, source = _moved_pair(target, source, values, layout)
    return _einsum(_units_first(target, axis), _units_first(source, axis), "ix,jx->ij")


@functools.partial(jax.jit, static_argnames=("layout", "axis"), donate_argnames="scores")
def _add_unit_scores(scores, weight, target, source, values, *, layout: Layout, axis: int):
    product = weight * _unit_scores(target, source, values, layout=layout, axis=axis).astype(jnp.float32)
    return product if scores is None else scores + product


@functools.partial(jax.jit, static_argnames=("layout", "axis"), donate_argnames="stack")
def _put_units(stack, leaf, values, factor, start, *, layout: Layout, axis: int):
    """Writes the units of a moved leaf, times a factor, into the columns of `stack` from `start` on."""
    units = _units_first(_move(leaf.astype(stack.dtype), values, layout), axis)
    return jax.lax.dynamic_update_slice_in_dim(stack, factor.astype(stack.dtype) * units, start, axis=1)


@functools.partial(jax.jit, donate_argnames="scores")
def _add_product(scores, rows, columns):
    product = _einsum(rows, columns, "ix,jx->ij").astype(jnp.float32)
    return product if scores is None else scores + product


@functools.partial(jax.jit, static_argnames=("layout", "axis"))
def _units_of_slot(part, values, *, layout: Layout, axis: int):
    return _units_first(_moved_pair(part, part, values, layout)[1], axis)


def _by_parent(leaf, parent_axis, axis):
    moved = jnp.moveaxis(leaf, (parent_axis, axis), (0, 1))
    return moved.reshape(*moved.shape[:2], -1)  # [parent, unit, rest]


@functools.partial(jax.jit, static_argnames=("layout", "parent_axis", "axis"))
def _slot_scores(target, source, values, *, layout: Layout, parent_axis: int, axis: int):
    target, source = _moved_pair(target, source, values, layout)
    return _einsum(_by_parent(target, parent_axis, axis), _by_parent(source, parent_axis, axis), "hix,hjx->hij")


@functools.partial(jax.jit, static_argnames=("layout", "parent_axis", "axis"))
def _pair_scores(target, source, values, *, layout: Layout, parent_axis: int, axis: int):
    target, source = _moved_pair(target, source, values, layout)
    return _einsum(_by_parent(target, parent_axis, axis), _by_parent(source, parent_axis, axis), "hix,gjx->hgij")


def _by_query(leaf, axes):
    """[head, query, unit, rest], one query where the leaf has no axis of them."""
    head, query, unit = axes
    if query < 0:
        return _by_parent(leaf, head, unit)[:, None]
    moved = jnp.moveaxis(leaf, axes, (0, 1, 2))
    return moved.reshape(*moved.shape[:3], -1)


@functools.partial(jax.jit, static_argnames=("layout", "axes"))
def _query_pairs(target, source, values, *, layout: Layout, axes: tuple[int, int, int]):
    target, source = _moved_pair(target, source, values, layout)
    return _einsum(_by_query(target, axes), _by_query(source, axes), "haix,gbjx->hgabij")


@functools.partial(jax.jit, static_argnames=("layout", "axes"))
def _plane_pairs(target, source, values, *, layout: Layout, axes: tuple[int, int, int]):
    target, source = (_by_query(leaf, axes) for leaf in _moved_pair(target, source, values, layout))
    (x, y), (u, v) = (jnp.split(leaf, 2, axis=2) for leaf in (target, source))
    # conj(x + i y) (u + i v)
    re = _einsum(x, u, "hapx,gbpx->hgabp") + _einsum(y, v, "hapx,gbpx->hgabp")
    im = _einsum(x, v, "hapx,gbpx->hgabp") - _einsum(y, u, "hapx,gbpx->hgabp")
    return jax.lax.complex(re, im)


@functools.partial(jax.jit, static_argnames=("parent_axis", "axis"))
def _unit_squares_of_slots(leaf, *, parent_axis: int, axis: int):
    wide = leaf.astype(jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32)
    return jnp.sum(jnp.square(_by_parent(wide, parent_axis, axis)), axis=2)


@functools.partial(jax.jit, static_argnames=("layout",))
def _leaf_product(target, source, values, *, layout: Layout):
    target, source = _moved_pair(target, source, values, layout)
    return jnp.sum(target * source), jnp.sum(source * source)
