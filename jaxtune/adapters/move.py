"""An adapter on another base: its factors move one by one and are never multiplied out, so the rank stays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.adapters.binding import Matrix, Whole, bind, group_rows, is_stacked, sides_of
from jaxtune.adapters.dense import row_change
from jaxtune.adapters.folded import Gains
from jaxtune.adapters.folder import Adapter, replace_tensors
from jaxtune.errors import SpecError
from jaxtune.models.keys import KeyTable, Row
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_same, flatten
from jaxtune.types import Leaf, Params

# Parts of a fused matrix share the factor on its input side. Their moved copies differ by rounding at most.
SHARED_TOLERANCE = 1e-5


def move_adapter(
    adapter: Adapter,
    table: KeyTable,
    *,
    source: Params,
    target: Params,
    spec: Spec | None = None,
    element: Mapping[str, Any] | None = None,
    folded: Spec | None = None,
    scale: float = 1.0,
    base: str | None = None,
) -> Adapter:
    """The adapter for another base: what `element` makes of its change, in factors of the same rank.

    An element acts on the output axes of a matrix through B and on its input axes through A, so `g(B A) = g(B) g(A)`
    exactly. Tensors that the adapter replaces (biases, modules to save) become the target's own plus the moved change.

    Args:
        adapter: Of `source`.
        table: The key table of `source`.
        source, target: Our trees of the old and the new base; values are read only where a tensor is replaced.
        spec, element: What moves weights of `source` to `target`; None leaves the change as it is.
        folded: Spec of the networks themselves where `spec` and `element` are those of their folded weights
            (`symmetry.canonical`), as transport method `full` finds them. Then the factor on the input side takes in
            the gain of the source's norm and gives off the target's. Networks with RMS norms only.
        scale: Factor of the change; goes into B.
        base: Path or name of the target, for adapter_config.json.

    Returns:
        An adapter of `target` with the names, ranks and stored dtypes of the old one.

    Raises:
        TreeMismatchError: the adapter does not fit its base, or the bases differ in a path or a shape.
        SpecError: the element does not fit; it moves what shares one factor (the parts of a fused matrix, experts
            stored one by one) apart; or weights are folded and the change would not be one of factors alone.
    """
    check_same({"source": source, "target": target})
    if (spec is None) != (element is None):
        raise TypeError("pass spec and element, or none of them.")
    if spec is not None:
        if folded is None:
            spec.check(source)
        elements.check(spec, element)
    moved: dict[str, np.ndarray] = {}
    ours, theirs = flatten(source), flatten(target)
    gains = None if folded is None else Gains(folded, ours, theirs)
    every, replaced = bind(adapter, table, source)
    if gains is not None:
        gains.check(every, [whole.name for whole in replaced if _is_changed(adapter, whole, ours)])
    for row, matrices, wholes in group_rows(every, replaced):
        if element is None or not is_stacked(row):
            for matrix in matrices:
                moved |= _move_factors(adapter, [matrix], spec, element, gains, scale)
        elif matrices:
            _check_experts(adapter, row, matrices)
            in_order = sorted(matrices, key=lambda matrix: row.names.index(matrix.name))
            moved |= _move_factors(adapter, in_order, spec, element, gains, scale)
        if wholes:
            moves = None if gains is not None else element  # then nothing changes that would have to move
            moved |= _move_wholes(adapter, row, wholes, spec, moves, scale, ours, theirs)
    return replace_tensors(adapter, moved, base=base)


def _move_factors(adapter, matrices: list[Matrix], spec, element, gains, scale) -> dict[str, np.ndarray]:
    """Names in the file -> moved factors of one matrix and of those tied to it, or of all matrices of one stacked leaf.

    Shapes:
        of one factor while it moves: float[matrix, long, rank].
    """
    first, is_many = matrices[0], is_stacked(matrices[0].row)
    a, b = (np.stack([_wide(adapter.tensors[getattr(matrix.low_rank, half)]) for matrix in matrices]) for half in "ab")
    a = np.swapaxes(a, 1, 2)
    if element is not None:
        inputs, outputs = [], np.full(b.shape, np.nan, b.dtype)
        for path in first.row.leaves:
            for side, factor in zip(sides_of(first, path), (a, b), strict=True):
                ndim = len(spec.axes[path]) - is_many
                views = np.stack([side.view(one, ndim) for one in factor])
                still = tuple(n for n in range(ndim) if n not in side.axes)
                if is_many:  # the matrices change places with the first axis of their leaf
                    still = tuple(n + 1 for n in still)
                else:
                    views = views[0]
                has_gain = gains is not None and factor is a
                views = gains.multiply(path, views) if has_gain else views
                views = elements.apply_to_leaf(spec, element, path, views, skip_axes=still)
                views = gains.divide(path, views) if has_gain else views
                views = views if is_many else views[None]
                back = np.stack([side.unview(view, factor.shape[1]) for view in views])
                if factor is b:
                    outputs = np.where(np.isnan(outputs), back, outputs)
                else:
                    inputs.append(back)
        for other in inputs[1:]:
            if np.abs(other - inputs[0]).max() > SHARED_TOLERANCE * np.abs(inputs[0]).max():
                raise SpecError(
                    f"{', '.join(first.row.leaves)}, parts of {first.name}, share one factor and would move apart. "
                    "Ask for full weights."
                )
        a, b = inputs[0], outputs
    b = b * np.asarray(scale, b.dtype)
    result = {}
    for matrix, one_a, one_b in zip(matrices, a, b, strict=True):
        result |= {matrix.low_rank.a: one_a.T, matrix.low_rank.b: one_b}
        for copy in matrix.copies:
            result |= {copy.a: one_b.T, copy.b: one_a}
    return result


def _is_changed(adapter, whole: Whole, leaves) -> bool:
    """Whether the adapter brings other values than the base has: a copy of a table it does not."""
    own = whole.row.encode({path: np.asarray(leaves[path]) for path in whole.row.leaves})[whole.name]
    return not np.array_equal(adapter.tensors[whole.tensor].astype(np.float64), own.astype(np.float64))


def _check_experts(adapter, row: Row, matrices: list[Matrix]):
    """Experts that change places need factors of one rank and one scale."""
    lacking = sorted(set(row.names) - {matrix.name for matrix in matrices})
    looks = {(len(adapter.tensors[matrix.low_rank.a]), matrix.low_rank.scale) for matrix in matrices}
    if lacking or len(looks) > 1:
        reason = f"{lacking[0]} has none" if lacking else "they differ in rank or scale"
        raise SpecError(
            f"{matrices[0].name} has factors that change places with those of {len(row.names) - 1} other experts, "
            f"and {reason}. Ask for full weights."
        )


def _move_wholes(
    adapter, row: Row, wholes: list[Whole], spec, element, scale, source: Mapping[str, Leaf], target: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Names in the file -> the target's tensors with the moved change."""
    change = row_change(adapter, row, [], wholes, source, np.float64)
    if element is not None:
        change = {path: elements.apply_to_leaf(spec, element, path, leaf) for path, leaf in change.items()}
    change = row.encode(change)
    own = row.encode({path: np.asarray(target[path]) for path in row.leaves})
    result = {}
    for whole in wholes:
        tensor = own[whole.name].astype(np.float64) + scale * change[whole.name]
        result |= {name: tensor.astype(_wide(own[whole.name]).dtype) for name in (whole.tensor, *whole.copies)}
    return result


def _wide(tensor):
    """In float32 or wider."""
    return tensor.astype(np.float64 if tensor.dtype == np.float64 else np.float32)
