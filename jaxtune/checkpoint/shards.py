"""A model in many files and an index, which must tell the same story."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint import files, safetensors
from jaxtune.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def read_shards(
    folder: Path,
    index: bytes,
    *,
    index_name: str = INDEX_NAME,
    weights_name: str = WEIGHTS_NAME,
    suffix: str = ".safetensors",
    read: Callable[[Path], tuple[Any, dict[str, np.ndarray]]] = safetensors.read_tensors,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads every shard that an index names.

    Args:
        folder: Where the shards lie; nothing outside it is opened.
        index: Content of the index.
        index_name: How the index is called.
        weights_name: How the file is called that holds everything where there are no shards.
        suffix: How the names of shards end.
        read: Path of a shard -> (its header, an object with `tensors`; its tensors).

    Returns:
        headers: Shard -> its header, sorted by name.
        tensors: All tensors, memory-mapped.

    Raises:
        CheckpointError: the index is damaged or names a place outside the folder; a shard is missing or damaged; a
            tensor is in two shards, in another shard than the index says, or in one of the two alone; or a whole
            file of weights lies beside shards.
    """
    weight_map = _parse_index(folder, index, index_name, suffix)
    shards = sorted(set(weight_map.values()))
    if weights_name not in shards and os.path.lexists(folder / weights_name):
        raise CheckpointError(f"{folder}: both {weights_name} and {index_name}, which does not name it. Remove one.")
    headers: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        path = files.locate(folder, shard)
        if not os.path.exists(path):
            raise CheckpointError(f"{path}: named by {index_name} but missing. Download it, or every shard, again.")
        header, arrays = read(path)
        for name in arrays:
            if name in tensors:
                first = next(other for other in headers if name in headers[other].tensors)
                raise CheckpointError(f"{path}: tensor {name!r} is also in {first}. Write the shards again.")
            if weight_map.get(name) != shard:
                said = f"says {weight_map[name]!r}" if name in weight_map else "does not name it"
                raise CheckpointError(f"{path}: holds tensor {name!r}, but {index_name} {said}. Write them again.")
        headers[shard] = header
        tensors |= arrays
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder / shard}: tensor {name!r} is missing, but {index_name} says it is there. Write them again."
            )
    return headers, tensors


def _parse_index(folder, index, index_name, suffix):
    """Tensor -> shard, as strings; whether a shard's name is a plain one is judged when it is opened."""
    where = folder / index_name
    weight_map = files.parse_object(index, str(where)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected an object 'weight_map', tensor -> file. Write the index again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(suffix):
            raise CheckpointError(
                f"{where}: tensor {name!r}: expected a {suffix} of this folder, found {shard!r}. Correct the index."
            )
    return weight_map
