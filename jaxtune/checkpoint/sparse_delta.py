"""A difference of weights with few entries: their places and values, in one safetensors file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint.files import parse_object
from jaxtune.checkpoint.safetensors import make_header, read_tensors
from jaxtune.errors import CheckpointError, TreeMismatchError
from jaxtune.tree import describe_leaf, flatten, unflatten
from jaxtune.types import Params

FORMAT = "jaxtune-sparse-delta"


@dataclass(frozen=True)
class SparseDelta:
    """What a sparse fine-tune changed; a tied leaf is one leaf of a tree and so is counted once.

    Attributes:
        shapes: Path -> shape of every leaf that has entries.
        indices: Path -> int64[k], places in the flattened leaf, increasing.
        values: Path -> float32[k], what is added there.
        whole: Path -> a leaf that is replaced, not added to: a new head.
    """

    shapes: dict[str, tuple[int, ...]]
    indices: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    whole: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_entries(self) -> int:
        """Of all leaves, those in `whole` left out."""
        return sum(len(places) for places in self.indices.values())


def make_sparse_delta(
    base: Params, finetuned: Params, *, smallest: float = 1e-7, whole: Sequence[str] = ()
) -> SparseDelta:
    """The entries of `finetuned - base` that are larger than `smallest` in magnitude.

    Args:
        base, finetuned: Trees of the same paths.
        smallest: What is not larger is dropped.
        whole: Paths of leaves that are stored as they are.
    """
    old, new = flatten(base), flatten(finetuned)
    shapes, indices, values = {}, {}, {}
    for path, leaf in old.items():
        if path in whole:
            continue
        change = (np.asarray(new[path], np.float32) - np.asarray(leaf, np.float32)).ravel()
        places = np.flatnonzero(np.abs(change) > smallest)
        if len(places):
            shapes[path], indices[path], values[path] = tuple(leaf.shape), places.astype(np.int64), change[places]
    return SparseDelta(shapes, indices, values, {path: np.asarray(new[path]) for path in whole})


def apply_sparse_deltas(base: Params, deltas: Sequence[SparseDelta], *, skip: Sequence[str] = ()) -> dict[str, Any]:
    """`base + Σ delta`, in float32 or wider, rounded once; then the leaves that a delta has whole.

    Args:
        base: What all of them were counted from.
        deltas: In any order: a language's and a task's, for instance.
        skip: Paths of whole leaves that are not taken, such as the language model's head.

    Raises:
        TreeMismatchError: a leaf that the base does not have, or has in another shape; one leaf is whole in two deltas.
    """
    flat = flatten(base)
    sums: dict[str, np.ndarray] = {}
    placed: dict[str, np.ndarray] = {}
    for number, delta in enumerate(deltas):
        for path, shape in delta.shapes.items():
            _check(path, flat, shape, f"sparse delta {number}")
            wide = np.float64 if np.dtype(flat[path].dtype) == np.float64 else np.float32
            total = sums.setdefault(path, np.asarray(flat[path]).astype(wide).ravel())
            total[delta.indices[path]] += delta.values[path].astype(wide)
        for path, leaf in delta.whole.items():
            if path in skip:
                continue
            if path in placed:
                raise TreeMismatchError(f"{path} is whole in two sparse deltas; leave one out with skip=({path!r},).")
            _check(path, flat, leaf.shape, f"sparse delta {number}")
            placed[path] = leaf
    changed = {path: total.reshape(flat[path].shape).astype(flat[path].dtype) for path, total in sums.items()}
    placed = {path: leaf.astype(flat[path].dtype) for path, leaf in placed.items()}
    return unflatten({**flat, **changed, **placed})


def write_sparse_delta(path: str | Path, delta: SparseDelta) -> None:
    """Writes a new file.

    Raises:
        OSError: it exists, or the disk refused.
    """
    tensors: dict[str, np.ndarray] = {}
    for name in delta.shapes:
        tensors[f"{name}/indices"], tensors[f"{name}/values"] = delta.indices[name], delta.values[name]
    tensors |= {f"{name}/whole": leaf for name, leaf in delta.whole.items()}
    shapes = json.dumps({name: list(shape) for name, shape in delta.shapes.items()}, sort_keys=True)
    header = make_header(tensors, {"format": FORMAT, "shapes": shapes})
    header.write(Path(path), tensors.__getitem__)


def read_sparse_delta(path: str | Path) -> SparseDelta:
    """Reads what `write_sparse_delta` wrote.

    Raises:
        CheckpointError: the file is none of these, or damaged; names the leaf.
    """
    header, tensors = read_tensors(path)
    if header.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a sparse delta: its metadata has format {header.metadata.get('format')!r}.")
    shapes = parse_object(header.metadata.get("shapes", "").encode(), f"{path}: shapes")
    indices, values, whole, named = {}, {}, {}, set()
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise CheckpointError(f"{path}: the shape of {name!r} is {shape!r}, expected a list of sizes.")
        parts = [tensors.get(f"{name}/{part}") for part in ("indices", "values")]
        _check_entries(path, name, shape, *parts)
        indices[name], values[name] = (np.array(part) for part in parts)
        named |= {f"{name}/indices", f"{name}/values"}
    for name in tensors.keys() - named:
        if not name.endswith("/whole"):
            raise CheckpointError(f"{path}: tensor {name!r} belongs to no leaf of its shapes.")
    whole = {name.removesuffix("/whole"): np.array(leaf) for name, leaf in tensors.items() if name not in named}
    return SparseDelta({name: tuple(shape) for name, shape in shapes.items()}, indices, values, whole)


def _check_entries(path, name, shape, indices, values):
    size = int(np.prod(shape, dtype=np.int64))
    if indices is None or values is None or indices.dtype != np.int64 or values.dtype != np.float32:
        raise CheckpointError(f"{path}: leaf {name!r} needs int64 indices and float32 values.")
    if indices.ndim != 1 or indices.shape != values.shape:
        raise CheckpointError(
            f"{path}: leaf {name!r} has indices {describe_leaf(indices)}, values {describe_leaf(values)}."
        )
    if len(indices) and not (indices[0] >= 0 and indices[-1] < size and (np.diff(indices) > 0).all()):
        raise CheckpointError(f"{path}: the indices of leaf {name!r} do not increase within 0 to {size - 1}.")
    if not np.isfinite(values).all():
        raise CheckpointError(f"{path}: the values of leaf {name!r} hold NaN or Inf.")


def _check(path: str, flat: Mapping[str, Any], shape: Sequence[int], where: str) -> None:
    if path not in flat or tuple(flat[path].shape) != tuple(shape):
        found = "no such leaf" if path not in flat else describe_leaf(flat[path])
        raise TreeMismatchError(f"{where}: {path} has shape {list(shape)}, the base has {found}.")
