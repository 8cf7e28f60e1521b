"""The files of an output: which tensors lie where."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.checkpoint import Checkpoint, safetensors
from jaxtune.checkpoint.shards import WEIGHTS_NAME

SHARD_BYTES = 5_000_000_000  # as the libraries that read these folders split them
METADATA = {"format": "pt"}  # transformers asks for it


@dataclass(frozen=True)
class OutputFiles:
    """Files of tensors, and their index.

    Attributes:
        headers: File name -> header.
        index: Bytes of the index; None for a single file.
    """

    headers: Mapping[str, safetensors.Header]
    index: bytes | None

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(
            header.data_start + max((info.stop for info in header.tensors.values()), default=0)
            for header in self.headers.values()
        )


def lay_out(
    tensors: Mapping[str, Any], like: Checkpoint | None = None, *, shard_bytes: int = SHARD_BYTES
) -> OutputFiles:
    """Decides which file holds which tensor.

    Args:
        tensors: Name -> dtype and shape, in the order of the output.
        like: Checkpoint whose files are taken over, name by name, where it holds the very same tensors; in other
            dtypes the files keep names, tensors and order.
        shard_bytes: Most data a file has, where files are split afresh; a tensor is never split.
    """
    stored = {} if like is None else like.layout.tensors
    is_like = like is not None and like.format in ("folder", "safetensors", "torch") and stored.keys() == tensors.keys()
    if is_like:
        headers = {}
        for file in like.layout.files:
            infos = {name: tensors[name] for name in file.header.tensors}
            same = all(
                info.dtype == file.header.tensors[name].dtype and tuple(info.shape) == file.header.tensors[name].shape
                for name, info in infos.items()
            )
            headers[file.name] = (
                file.header if same else safetensors.make_header(infos, file.header.metadata or METADATA)
            )
        is_same = all(headers[file.name] is file.header for file in like.layout.files)
        if is_same or like.layout.index is None:
            return OutputFiles(headers, like.layout.index)
        return OutputFiles(headers, _make_index(headers))
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        return OutputFiles({WEIGHTS_NAME: safetensors.make_header(shards[0], METADATA)}, None)
    stem, suffix = WEIGHTS_NAME.split(".")
    headers = {
        f"{stem}-{n:05d}-of-{len(shards):05d}.{suffix}": safetensors.make_header(shard, METADATA)
        for n, shard in enumerate(shards, 1)
    }
    return OutputFiles(headers, _make_index(headers))


def _split(tensors, shard_bytes):
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, info in tensors.items():
        num_bytes = int(np.prod(info.shape, dtype=np.int64)) * np.dtype(info.dtype).itemsize
        if filled and filled + num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += num_bytes
    return shards


def _make_index(headers: Mapping[str, safetensors.Header]) -> bytes:
    total = sum(max((info.stop for info in header.tensors.values()), default=0) for header in headers.values())
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()
