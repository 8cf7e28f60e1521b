"""A checkpoint with an adapter merged into it, tensor by tensor as they are read."""

import dataclasses
from pathlib import Path

import numpy as np

from jaxtune.adapters import read_adapter
from jaxtune.adapters.binding import bind
from jaxtune.adapters.dense import multiply_out
from jaxtune.checkpoint import Checkpoint
from jaxtune.errors import ConfigError, JaxtuneError
from jaxtune.lazy import LazyLeaf
from jaxtune.loading import understand
from jaxtune.tree import flatten, unflatten


def adapt(stored: Checkpoint, folder: Path) -> Checkpoint:
    """A checkpoint with an adapter merged into its stored tensors, each made when it is read.

    In float32, or float64, so that small changes of 16-bit weights are not rounded away; `layout` keeps the stored
    dtypes. Tensors that the adapter leaves alone stay the mapped ones.

    Raises:
        ConfigError, TreeMismatchError: the adapter is not one of this base.
    """
    adapter = read_adapter(folder)
    understood = understand(stored, lazy=True)
    if understood.layout.codec is None:
        raise ConfigError(
            f"{stored.path}: an adapter names layers of a family that we know, and this checkpoint is of "
            f"{stored.config.get('model_type')!r}. Merge it with the library that wrote it, and name the folder."
        )
    try:
        matrices, wholes = bind(adapter, understood.layout.codec.table, understood.params)
    except JaxtuneError as error:
        raise type(error)(f"{folder}: {error}") from error
    tensors = flatten(stored.params)
    wholes = {whole.name: adapter.tensors[whole.tensor] for whole in wholes}
    changed: dict[str, list] = {name: [] for name in wholes}
    for matrix in matrices:
        changed.setdefault(matrix.name, []).append(matrix)
    for name, own in changed.items():
        start = wholes.get(name, tensors[name])
        dtype = np.float64 if np.float64 in (start.dtype, tensors[name].dtype) else np.float32

        def make(start=start, own=own, dtype=dtype):
            return sum((multiply_out(adapter, matrix, dtype) for matrix in own), np.asarray(start).astype(dtype))

        tensors[name] = LazyLeaf(tensors[name].shape, dtype, make)
    tokens = {name: place for name, place in adapter.side_files.items() if "token" in name or name.startswith("vocab")}
    return dataclasses.replace(stored, params=unflatten(tensors), side_files={**stored.side_files, **tokens})
