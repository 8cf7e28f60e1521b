"""Recognises what lies at a path and loads it.

Tensor names are kept as they are stored. Our own families name tensors by their paths, so a name is split at "/"
into the nested dict; names of other families have no "/" and stay whole, one level deep, for a key table to rename.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint import files, npz, orbax, safetensors, torch_convert
from jaxtune.checkpoint.settle import settle_config
from jaxtune.checkpoint.shards import INDEX_NAME, WEIGHTS_NAME, read_shards
from jaxtune.errors import CheckpointError, TreeMismatchError
from jaxtune.tree import unflatten
from jaxtune.types import Params

CONFIG_NAME = "config.json"
OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"  # of weights whose file is named open_clip_*
CONFIG_KEY = "jaxtune_config"  # of the metadata of a .safetensors that travels alone
ORBAX_NAME = "params"
MAX_DEPTH = 64  # of a tensor's path; recursion over a tree stays far from Python's limit

EXPECTED = (
    f"Expected one of: a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or shards and {INDEX_NAME}; "
    f"with {OPEN_CLIP_CONFIG_NAME} and open_clip_*.safetensors; "
    "a single .safetensors; an .npz; an orbax folder, "
    f"or a folder with {CONFIG_NAME} and an orbax folder {ORBAX_NAME!r}; a file of torch.save "
    f"({', '.join(torch_convert.TORCH_SUFFIXES)}), or a folder with it and {CONFIG_NAME}."
)


@dataclass(frozen=True)
class StoredFile:
    """One file (for orbax: folder) of tensors.

    Attributes:
        name: Its name in the checkpoint's folder.
        header: What it holds, in order, and all that is needed to write it again.
    """

    name: str
    header: safetensors.Header | npz.Archive | orbax.OrbaxTree


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is stored: which file holds each tensor, in which order and dtype.

    Attributes:
        files: In the order in which they are written.
        config: The bytes of config.json; `None` where the config is inside a file of tensors.
        config_name: What that file is called.
        index: The bytes of the index of shards; `None` where there is none.
        codec: Between the stored tensors and a tree with other names and axes (`models.keys.Codec`): `encoder(params)`
            gives stored name -> tensor, `leaves` the tree's own dtypes and shapes. `None` where names are paths.
    """

    files: tuple[StoredFile, ...]
    config: bytes | None = None
    index: bytes | None = None
    codec: Any = None
    config_name: str = CONFIG_NAME

    @property
    def tensors(self) -> dict[str, Any]:
        """Name of every tensor -> its stored `dtype` and `shape`, in the order of the files."""
        return {name: info for file in self.files for name, info in file.header.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Size of all tensors as stored."""
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in self.tensors.values())


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk.

    Attributes:
        params: Nested dict of read-only arrays in their stored dtype; memory-mapped where the format allows.
        config: The config as parsed, nothing interpreted.
        format: "folder", "safetensors", "npz", "orbax" or "torch".
        path: What was loaded.
        layout: How to store parameters of the same shapes again; of torch files as safetensors.
        side_files: Every other file of the folder (tokenizer, licence, …) by relative name -> where to read it.
        left_out: Files (and what is in torch files beside the weights) that are not carried along -> why.
        ties: Name of a tensor -> the earlier name of the very same numbers, where the format tells (torch).
        read_from: Files that were read, by name, where `layout` names others (torch).
        network: Native config of the network, where `jaxtune.load` knows the family; None otherwise.
    """

    params: Params
    config: dict[str, Any]
    format: str
    path: Path
    layout: Layout
    side_files: dict[str, Path]
    left_out: dict[str, str]
    ties: dict[str, str] = field(default_factory=dict)
    read_from: dict[str, Path] = field(default_factory=dict)
    network: Any = None

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of all files together; the first file that has a key decides."""
        merged: dict[str, str] = {}
        for file in reversed(self.layout.files):
            merged.update(file.header.metadata)
        return merged


def load(path: str | Path, *, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Loads a checkpoint of any format.

    Args:
        path: A folder with config.json and safetensors, one or many with an index; a single .safetensors (config in
            its metadata under "jaxtune_config", or in config.json beside it); an .npz (config in an entry
            "config.json", or beside it); an orbax folder; a .bin, .pt, .pth or .ckpt of torch.save (config.json beside
            it), a folder with one, or with its shards.
        config: For a checkpoint that has none. `{}` reads the tensors of a model of unknown family.

    Returns:
        A `Checkpoint`; a name that its index or its folder gives is never followed out of the folder. Links into
        the blobs of a Hugging Face cache count as inside.

    Raises:
        CheckpointError: nothing there, nothing recognised, damaged, hostile, without config, or with another config
            than the argument.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such file or folder. {EXPECTED}")
    if os.path.isdir(path):
        return _load_folder(path, config)
    suffix = path.suffix.lower()
    if suffix in files.PICKLE_SUFFIXES:
        return _load_torch(path, path, config)
    if suffix not in (".safetensors", ".npz"):
        raise CheckpointError(f"{path}: a file that ends in neither .safetensors nor .npz. {EXPECTED}")
    kind = suffix.removeprefix(".")
    stored, tensors, configs = (_read_safetensors if kind == "safetensors" else _read_npz)(path)
    beside, name = None, CONFIG_NAME
    if not configs:
        name, beside, configs = _read_config(path.parent, [path.name])
    return _assemble(path, kind, [stored], tensors, configs, config, beside=beside, config_name=name)


def _load_folder(folder, config):
    """A folder: orbax itself, or config.json and weights in the first form that is found."""
    if files.is_orbax(folder):
        stored, tensors = _read_orbax(folder)
        found = next((place for place in (folder, folder.parent) if os.path.lexists(place / CONFIG_NAME)), None)
        beside = files.read_small(files.locate(found, CONFIG_NAME)) if found else None
        configs = {str(found / CONFIG_NAME): beside} if found else {}
        return _assemble(folder, "orbax", [stored], tensors, configs, config, beside=beside)

    names = _list_names(folder)
    index = None
    config_name, beside, configs = _read_config(folder, names)
    weights = [name for name in names if name.endswith(".safetensors")]
    archives = [name for name in names if name.endswith(".npz")]
    kind, own = "folder", [config_name]
    if INDEX_NAME in names:
        index = files.read_small(files.locate(folder, INDEX_NAME))
        headers, tensors = read_shards(folder, index)
        stored = [StoredFile(shard, header) for shard, header in headers.items()]
        own.append(INDEX_NAME)
    elif WEIGHTS_NAME in names or len(weights) == 1:
        name = WEIGHTS_NAME if WEIGHTS_NAME in names else weights[0]
        file, tensors, inside = _read_safetensors(files.locate(folder, name))
        stored, configs = [file], configs | inside
    elif weights:
        raise CheckpointError(f"{folder}: {len(weights)} .safetensors but no {INDEX_NAME}. {_list(names)}{EXPECTED}")
    elif files.is_orbax(folder / ORBAX_NAME):
        kind = "orbax"
        file, tensors = _read_orbax(files.locate(folder, ORBAX_NAME))
        stored = [file]
    elif len(archives) == 1:
        kind = "npz"
        file, tensors, inside = _read_npz(files.locate(folder, archives[0]))
        stored, configs = [file], configs | inside
    else:
        torch_weights = torch_convert.find_weights(folder, names)
        if torch_weights is None:
            raise CheckpointError(_refuse_folder(folder, names))
        return _load_torch(folder, files.locate(folder, torch_weights), config)
    own += [file.name for file in stored]
    side_files, left_out = files.list_side_files(folder, own)
    return _assemble(
        folder, kind, stored, tensors, configs, config,
        beside=beside, index=index, side_files=side_files, left_out=left_out, config_name=config_name,
    )  # fmt: skip


def _read_config(folder, names):
    """(name, bytes, {where: bytes}) of the config in a folder that belongs to the weights among `names`.

    A folder may hold one model in the names of two libraries. Those of transformers go first, with config.json;
    OpenCLIP's, with its own config, are read where there are no others.
    """
    weights = [name for name in names if name.endswith((".safetensors", *torch_convert.TORCH_SUFFIXES))]
    is_open_clip = bool(weights) and all(name.startswith("open_clip_") for name in weights)
    name = OPEN_CLIP_CONFIG_NAME if is_open_clip and os.path.lexists(folder / OPEN_CLIP_CONFIG_NAME) else CONFIG_NAME
    if not os.path.lexists(folder / name):
        return name, None, {}
    beside = files.read_small(files.locate(folder, name))
    return name, beside, {str(folder / name): beside}


def _load_torch(path, weights, config):
    """What torch.save wrote: `weights` is the file, or the index of shards, and `path` that file or its folder."""
    folder = weights.parent
    config_name, beside, configs = _read_config(folder, _list_names(folder) if path == folder else [weights.name])

    def drops_ties():
        return torch_convert.are_ties_restored(settle_config(path, configs, config))

    if weights.name == torch_convert.TORCH_INDEX_NAME:
        converted = torch_convert.convert_shards(folder, drops_ties=drops_ties)
    else:
        converted = torch_convert.convert_file(weights, drops_ties=drops_ties)
    side_files, left_out = {}, {}
    if path == folder:
        side_files, left_out = files.list_side_files(folder, [config_name, *converted.read_from])
    stored = [StoredFile(name, header) for name, header in converted.headers.items()]
    return _assemble(
        path, "torch", stored, converted.tensors, configs, config,
        beside=beside, index=converted.index, side_files=side_files, left_out=left_out | converted.left_out,
        ties=converted.ties, read_from=converted.read_from, config_name=config_name,
    )  # fmt: skip


def _read_safetensors(path):
    """One file, its tensors, and the config in its metadata if there is one."""
    header, tensors = safetensors.read_tensors(path)
    text = header.metadata.get(CONFIG_KEY)
    configs = {} if text is None else {f"{path}: metadata {CONFIG_KEY!r}": text.encode("utf-8", "surrogatepass")}
    return StoredFile(path.name, header), tensors, configs


def _read_npz(path):
    """One archive, its tensors, and the config in it if there is one."""
    archive, tensors = npz.read_archive(path)
    configs = {} if archive.config is None else {f"{path}: entry {npz.CONFIG_ENTRY!r}": archive.config}
    return StoredFile(path.name, archive), tensors, configs


def _read_orbax(folder):
    """One orbax folder and its tensors; written again it is called "params", whatever it was called."""
    tree, tensors = orbax.read_tree(folder)
    return StoredFile(ORBAX_NAME, tree), tensors


def _assemble(
    path, kind, stored, tensors, configs, given,
    *, beside=None, index=None, side_files=None, left_out=None, ties=None, read_from=None, config_name=CONFIG_NAME,
):  # fmt: skip
    """The checkpoint, once everything is read."""
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensor. Name another checkpoint.")
    return Checkpoint(
        params=_nest(path, tensors),
        config=settle_config(path, configs, given),
        format=kind,
        path=path,
        layout=Layout(tuple(stored), beside, index, config_name=config_name),
        side_files=side_files or {},
        left_out=left_out or {},
        ties=ties or {},
        read_from=read_from or {},
    )


def _nest(path, tensors: dict[str, np.ndarray]):
    """Nested dict of tensors named by path."""
    for name in tensors:
        parts = name.split("/")
        if not all(parts) or len(parts) > MAX_DEPTH or not name.isprintable():
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected printable words joined by '/', at most {MAX_DEPTH} of them. "
                "Rename the tensor."
            )
    try:
        return unflatten(tensors)
    except TreeMismatchError as error:
        raise CheckpointError(f"{path}: the tensors do not form a tree: {error} Rename one.") from error


def _list_names(folder):
    """Names in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}. Check its permissions.") from error


def _list(names):
    shown = ", ".join(repr(name) for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"Found: {shown}. " if names else "The folder is empty. "


def _refuse_folder(folder, names):
    """Why a folder is not a checkpoint, and what might have been meant."""
    steps = [name for name in names if files.is_orbax(folder / name)]
    if steps:
        return f"{folder}: not a checkpoint itself; orbax checkpoints in it: {_list(steps)}Name one of them."
    return f"{folder}: nothing recognised. {_list(names)}{EXPECTED}"
