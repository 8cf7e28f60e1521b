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
from jaxtune.models import registry
from jaxtune.recipes.jobs import Planned
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
        raise _unknown_family(stored)
    matrices, wholes = _bind(adapter, folder, understood.layout.codec.table, understood.params)
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
    return dataclasses.replace(stored, params=unflatten(tensors), side_files=_with_tokens(stored, adapter))


def plan_adapted(planned: Planned, folder: Path) -> Planned:
    """The same of a model that is not made yet, as far as its names and shapes tell.

    Raises:
        ConfigError, TreeMismatchError: as `adapt`.
    """
    adapter = read_adapter(folder)
    if not registry.is_stored_family(planned.config):
        raise _unknown_family(planned)
    tensors = planned.stand_ins()
    _, table = registry.read_stored(planned.config, tensors)
    _bind(adapter, folder, table, table.decode(tensors, lazy=True))
    return dataclasses.replace(planned, side_files=_with_tokens(planned, adapter))


def _bind(adapter, folder, table, params):
    try:
        return bind(adapter, table, params)
    except JaxtuneError as error:
        raise type(error)(f"{folder}: {error}") from error


def _with_tokens(model, adapter):
    tokens = {name: place for name, place in adapter.side_files.items() if "token" in name or name.startswith("vocab")}
    return {**model.side_files, **tokens}


def _unknown_family(model):
    return ConfigError(
        f"{model.path}: an adapter names layers of a family that we know, and this checkpoint is of "
        f"{model.config.get('model_type')!r}. Merge it with the library that wrote it, and name the folder."
    )
