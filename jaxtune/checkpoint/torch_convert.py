"""Torch files as checkpoints: which file of a folder holds the weights, and how they are stored again.

A pickle is never written: the way back from a torch file is safetensors with the same names, one file for one, shards
for shards. Names that were tied (one storage under two names) are stored once where transformers ties them again by
itself, and under every name otherwise.
"""

import fnmatch
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint import files, safetensors
from jaxtune.checkpoint.shards import INDEX_NAME, read_shards
from jaxtune.checkpoint.torch_file import TorchFile, read_tensors
from jaxtune.errors import CheckpointError

TORCH_WEIGHTS_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# What training loops put beside the weights, in the same kind of file.
NO_WEIGHTS = (
    *("training_args.bin", "optimizer.*", "optimizer_*", "scheduler.*", "scheduler_*", "scaler.*", "rng_state*"),
    *("random_states*", "openvino_*", "*.safetensors.bin"),
)


@dataclass(frozen=True)
class Converted:
    """Torch files, and how to store their tensors as safetensors.

    Attributes:
        headers: File to write -> what it will hold.
        tensors: Name -> view of the mapped torch file.
        ties: Name -> the earlier name of the same numbers.
        index: Bytes of the index to write, None for one file.
        read_from: Torch file or index, by its name in the folder -> where it was read.
        left_out: What is not carried along as it was -> why.
    """

    headers: dict[str, safetensors.Header]
    tensors: dict[str, np.ndarray]
    ties: dict[str, str]
    index: bytes | None
    read_from: dict[str, Path]
    left_out: dict[str, str]


def find_weights(folder: Path, names: Collection[str]) -> str | None:
    """The torch file, or the index of shards, that holds the weights of a folder; None where there is none.

    Raises:
        CheckpointError: several files that could be the weights.
    """
    for name in (TORCH_INDEX_NAME, TORCH_WEIGHTS_NAME):
        if name in names:
            return name
    found = [name for name in sorted(names) if name.lower().endswith(TORCH_SUFFIXES)]
    found = [name for name in found if not any(fnmatch.fnmatchcase(name, pattern) for pattern in NO_WEIGHTS)]
    if len(found) > 1:
        shown = ", ".join(repr(name) for name in found[:12])
        raise CheckpointError(
            f"{folder}: {len(found)} torch files but no {TORCH_INDEX_NAME}: {shown}. Name one of them."
        )
    return found[0] if found else None


def convert_file(path: Path, *, drops_ties: Callable[[], bool]) -> Converted:
    """One torch file.

    Args:
        path: The file.
        drops_ties: Whether tied names are stored once; asked only where there are some.

    Raises:
        CheckpointError: as `torch_file.read_tensors`, or a tensor that safetensors cannot hold.
    """
    return _convert({path.name: read_tensors(path)}, {path.name: path}, None, drops_ties)


def convert_shards(folder: Path, *, drops_ties: Callable[[], bool]) -> Converted:
    """The shards that pytorch_model.bin.index.json names.

    Raises:
        CheckpointError: as `convert_file` and `shards.read_shards`.
    """
    place = files.locate(folder, TORCH_INDEX_NAME)
    index = files.read_small(place)
    loaded: dict[str, TorchFile] = {}

    def read(path):
        loaded[path.name] = read_tensors(path)
        return loaded[path.name], loaded[path.name].tensors

    read_shards(folder, index, index_name=TORCH_INDEX_NAME, weights_name=TORCH_WEIGHTS_NAME, suffix=".bin", read=read)
    places = {name: files.locate(folder, name) for name in sorted(loaded)}
    return _convert({name: loaded[name] for name in places}, places | {TORCH_INDEX_NAME: place}, index, drops_ties)


def are_ties_restored(config: Mapping[str, Any]) -> bool:
    """Whether the library of a config ties tensors again that are stored once.

    transformers does, unless the config (or the config of a part) says that its embeddings are not tied: what shares a
    storage then does so by chance and is expected under every name. Others expect every name.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type.startswith("jaxtune"):
        return False
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return all(part.get("tie_word_embeddings") is not False for part in parts)


def _convert(loaded, read_from, index, drops_ties):
    """Names, headers and notes of all files together."""
    ties = {name: first for file in loaded.values() for name, first in file.ties.items()}
    dropped = set(ties) if ties and drops_ties() else set()
    headers, tensors, left_out, weight_map = {}, {}, {}, {}
    for name, file in loaded.items():
        written = _rename(name)
        if written in headers:
            raise CheckpointError(f"{read_from[name]}: {written} would be written twice. Rename a shard.")
        kept = {tensor: array for tensor, array in file.tensors.items() if tensor not in dropped}
        aligned = sorted(kept.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        try:
            headers[written] = safetensors.make_header(dict(aligned), {"format": "pt"})
        except CheckpointError as error:
            raise CheckpointError(f"{read_from[name]}: {error}") from error
        tensors |= kept
        weight_map |= dict.fromkeys(kept, written)
        left_out[name] = f"a pickle, which is read and never written: its tensors are stored as {written}"
        left_out |= {f"{name}: {what}": why for what, why in file.left_out.items()}
        left_out |= {
            f"{name}: {tensor}": f"tied to {ties[tensor]}, which stands for it"
            for tensor in file.ties
            if tensor in dropped
        }
    if index is not None:
        left_out[TORCH_INDEX_NAME] = f"the index of pickles; {INDEX_NAME} takes its place"
        total = sum(array.nbytes for array in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        index = (json.dumps(content, indent=2) + "\n").encode()
    return Converted(headers, tensors, ties, index, dict(read_from), left_out)


def _rename(name):
    """pytorch_model.bin is model.safetensors, and open_clip_pytorch_model.bin open_clip_model.safetensors."""
    return Path(name).stem.replace("pytorch_model", "model") + ".safetensors"
