"""An adapter on another base: its factors move one by one and are never multiplied out, so the rank stays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.adapters.binding import Matrix, Whole, bind, group_rows, is_stacked, sides_of
from jaxtune.adapters.dense import row_change
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
        scale: Factor of the change; goes into B.
        base: Path or name of the target, for adapter_config.json.

    Returns:
        An adapter of `target` with the names, ranks and stored dtypes of the old one.

    Raises:
        TreeMismatchError: the adapter does not fit its base, or the bases differ in a path or a shape.
        SpecError: the element does not fit; or it moves what shares one factor (the parts of a fused matrix, experts
            stored one by one) apart.
    """
    check_same({"source": source, "target": target})
    if (spec is None) != (element is None):
        raise TypeError("pass spec and element, or none of them.")
    if spec is not None:
        spec.check(source)
        elements.check(spec, element)
    moved: dict[str, np.ndarray] = {}
    ours, theirs = flatten(source), flatten(target)
    for row, matrices, wholes in group_rows(*bind(adapter, table, source)):
        if matrices and is_stacked(row) and element is not None:
            raise SpecError(
                f"{matrices[0].name} is one of {len(row.names)} experts that change places, and its factors would have "
                "to change names. Ask for full weights."
            )
        for matrix in matrices:
            moved |= _move_factors(adapter, matrix, spec, element, scale)
        if wholes:
            moved |= _move_wholes(adapter, row, wholes, spec, element, scale, ours, theirs)
    return replace_tensors(adapter, moved, base=base)


def _move_factors(adapter, matrix: Matrix, spec, element, scale) -> dict[str, np.ndarray]:
    """Names in the file -> moved factors of one matrix and of those tied to it."""
    low = matrix.low_rank
    a, b = (_wide(adapter.tensors[name]) for name in (low.a, low.b))
    if element is not None:
        inputs, outputs = [], np.full(b.shape, np.nan, b.dtype)
        for path in matrix.row.leaves:
            ndim = len(spec.axes[path])
            for side, factor in zip(sides_of(matrix, path), (a.T, b), strict=True):
                still = tuple(axis for axis in range(ndim) if axis not in side.axes)
                leaf = elements.apply_to_leaf(spec, element, path, side.view(factor, ndim), skip_axes=still)
                back = side.unview(leaf, len(factor))
                if factor is b:
                    outputs = np.where(np.isnan(outputs), back, outputs)
                else:
                    inputs.append(back)
        for other in inputs[1:]:
            if np.abs(other - inputs[0]).max() > SHARED_TOLERANCE * np.abs(inputs[0]).max():
                raise SpecError(
                    f"{', '.join(matrix.row.leaves)}, parts of {matrix.name}, share one factor and would move apart. "
                    "Ask for full weights."
                )
        a, b = inputs[0].T, outputs
    b = b * np.asarray(scale, b.dtype)
    result = {low.a: a, low.b: b}
    for copy in matrix.copies:
        result |= {copy.a: b.T, copy.b: a.T}
    return result


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
