"""An adapter as a task vector: what its factors come to, leaf by leaf."""

from typing import Any

import numpy as np

from jaxtune.adapters.binding import Matrix, bind, group_rows
from jaxtune.adapters.folder import Adapter
from jaxtune.lazy import LazyLeaf, is_lazy, read
from jaxtune.models.keys import KeyTable, Row
from jaxtune.tree import apply_task_vector, flatten, is_float, unflatten
from jaxtune.types import Params


def adapter_task_vector(adapter: Adapter, table: KeyTable, base: Params) -> dict[str, Any]:
    """What the adapter adds to its base, as a tree of lazy leaves: each is multiplied out when it is read.

    Args:
        adapter: As `read_adapter` gives it.
        table: The key table of the base: `checkpoint.layout.codec.table`.
        base: Our tree of the base, lazy or not; where a tensor is replaced, its values are read.

    Shapes:
        every leaf: as in `base`; float32, or float64 where the base or a factor is. Zeros where nothing changes.

    Raises:
        TreeMismatchError: the adapter does not fit the base, see `binding.bind`.
    """
    leaves = flatten(base)
    vector = {path: _zeros(leaf) for path, leaf in leaves.items()}
    for row, matrices, wholes in group_rows(*bind(adapter, table, base)):
        tensors = [adapter.tensors[name] for m in matrices for name in (m.low_rank.a, m.low_rank.b)]
        dtype = np.result_type(np.float32, *(t.dtype for t in tensors if t.dtype == np.float64))
        dtype = np.result_type(dtype, *(vector[path].dtype for path in row.leaves))
        for path in row.leaves:

            def make(row=row, path=path, matrices=matrices, wholes=wholes, dtype=dtype):
                return row_change(adapter, row, matrices, wholes, leaves, dtype)[path]

            vector[path] = LazyLeaf(leaves[path].shape, dtype, make)
    return unflatten(vector)


def merge_adapter(adapter: Adapter, table: KeyTable, base: Params, *, scale: float = 1.0) -> dict[str, Any]:
    """The fine-tuned model: `base + scale * change`, in float32 or wider and rounded once to the dtypes of `base`.

    Raises:
        TreeMismatchError: the adapter does not fit the base.
    """
    own = flatten(base)
    merged = flatten(apply_task_vector(base, adapter_task_vector(adapter, table, base), scale))
    return unflatten({path: leaf if is_lazy(own[path]) else read(leaf) for path, leaf in merged.items()})


def row_change(adapter: Adapter, row: Row, matrices, wholes, leaves, dtype) -> dict[str, np.ndarray]:
    """What the adapter adds to the leaves of one row: path -> array."""
    # float32 and float64 hold what any stored float does.
    own = row.encode({path: np.asarray(leaves[path]) for path in row.leaves}) if wholes else {}
    change = {}
    for whole in wholes:
        change[whole.name] = adapter.tensors[whole.tensor].astype(dtype) - own[whole.name].astype(dtype)
    for matrix in matrices:
        product = multiply_out(adapter, matrix, dtype)
        change[matrix.name] = change[matrix.name] + product if matrix.name in change else product
    if len(change) < len(row.names):  # experts without factors of their own
        shapes = {name: tensor.shape for name, tensor in change.items()}
        shape = next(iter(shapes.values()))
        change |= {name: np.zeros(shape, dtype) for name in row.names if name not in change}
    return {path: np.ascontiguousarray(leaf) for path, leaf in row.decode(change).items()}


def multiply_out(adapter: Adapter, matrix: Matrix, dtype) -> np.ndarray:
    """`scale * B A` with the axes of the stored tensor."""
    low = matrix.low_rank
    a, b = (adapter.tensors[name].astype(dtype) for name in (low.a, low.b))
    product = b @ a if matrix.input_axis == 1 else (b @ a).T
    return product * np.asarray(low.scale, dtype)


def _zeros(leaf):
    """Zeros that take no memory."""
    dtype = leaf.dtype if not is_float(leaf) or leaf.dtype == np.float64 else np.float32
    return np.broadcast_to(np.zeros((), dtype), leaf.shape)
