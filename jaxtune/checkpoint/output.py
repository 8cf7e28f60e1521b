"""Writes parameters: in the layout of another checkpoint, or in a fresh one."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxtune.checkpoint import files, npz, orbax, safetensors
from jaxtune.checkpoint.formats import (
    CONFIG_KEY,
    INDEX_NAME,
    ORBAX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    Layout,
    StoredFile,
)
from jaxtune.checkpoint.publish import check_space, publish
from jaxtune.checkpoint.resume import finish_file
from jaxtune.checkpoint.rounding import check_castable, round_to_stored
from jaxtune.errors import CheckpointError, OutputError, TreeMismatchError, unknown_name
from jaxtune.tree import MAX_LINES, describe_leaf, flatten
from jaxtune.types import Params

SHARDS_NAME = "shards"  # in a folder of work
FORMATS = ("folder", "safetensors", "npz", "orbax")


def save(
    path: str | Path,
    params: Params,
    *,
    config: Mapping[str, Any] | None = None,
    like: Checkpoint | None = None,
    format: str | None = None,
    extra_files: Mapping[str, bytes | str] | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    work: Path | None = None,
) -> Path:
    """Publishes parameters as a folder at `path`, whole or not at all.

    Args:
        path: The folder to create. Also of a single file: a target `b.safetensors` becomes `path/b.safetensors`.
        params: Nested dict of NumPy or JAX arrays.
        config: Config of a fresh checkpoint; JSON-able.
        like: Write in the layout of this one: same files, names, order, dtypes, metadata, config and index bytes, and
            its side files. Floats are rounded to its dtypes, once. Brings its own config and format.
        format: Of a fresh checkpoint: "folder" (default; config.json and model.safetensors), "safetensors" (the
            config inside the one file), "npz" (likewise) or "orbax" (config.json and params/).
        extra_files: Name -> content, written beside the rest (report.json).
        overwrite: Whether a former output at `path` may be replaced.
        inputs: Checkpoints that `path` may not touch, besides `like`.
        work: Folder on the same file system, of `resume.keep_work`, in which each file is finished first.

    Returns:
        The absolute path of the folder.

    Raises:
        OutputError: see `publish`; or an extra file has the name of a file of the checkpoint.
        TreeMismatchError: names or shapes differ from those of `like`.
        CheckpointError: a value does not fit the stored dtype, or the format cannot hold a dtype, name or shape.
        UnknownNameError: no such format.
    """
    if like is not None:
        if config is not None or format is not None:
            raise TypeError("like brings its own config and format: pass like, or config and format.")
        layout, side_files, inputs = like.layout, like.side_files, (*inputs, like.path)
    else:
        if config is None:
            raise TypeError("a fresh checkpoint needs a config: pass config, or like.")
        layout, side_files = make_layout(params, config, format=format or "folder"), {}
    check_fits(params, layout)
    extra = {name: text.encode() if isinstance(text, str) else text for name, text in (extra_files or {}).items()}
    num_bytes = layout.num_bytes + sum(map(len, extra.values()))
    num_bytes += sum(place.stat().st_size for place in side_files.values() if place.exists())
    if work is not None:  # before anything lies beside the output that a killed process could not take away
        check_space(path, num_bytes)
        finish_shards(work, params, layout)
        num_bytes = 0
    with publish(path, overwrite=overwrite, inputs=inputs, num_bytes=num_bytes) as folder:
        write_checkpoint(folder, params, layout, side_files=side_files, work=work)
        write_extra_files(folder, extra)
    return Path(os.path.abspath(path))


def make_layout(params: Params, config: Mapping[str, Any], *, format: str = "folder") -> Layout:
    """How a fresh checkpoint stores `params`: one file, every leaf in its own dtype.

    In safetensors the widest dtypes come first, as the reference library has it, so that every leaf is aligned.

    Raises:
        UnknownNameError: no such format.
        CheckpointError: the format cannot hold a leaf, or there is none.
    """
    if format not in FORMATS:
        raise unknown_name("checkpoint format", format, FORMATS)
    infos = {name: _describe(name, leaf) for name, leaf in flatten(params).items()}
    if not infos:
        raise CheckpointError("params holds no leaf; there is nothing to save.")
    aligned = dict(sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize))
    text = json.dumps(config, indent=2) + "\n"
    if format == "folder":
        return Layout((StoredFile(WEIGHTS_NAME, safetensors.make_header(aligned)),), text.encode())
    if format == "safetensors":
        return Layout((StoredFile(WEIGHTS_NAME, safetensors.make_header(aligned, {CONFIG_KEY: json.dumps(config)})),))
    if format == "npz":
        return Layout((StoredFile("model.npz", npz.make_archive(infos, text.encode())),))
    return Layout((StoredFile(ORBAX_NAME, orbax.make_tree(infos)),), text.encode())


def check_fits(params: Params, layout: Layout) -> None:
    """Checks names, shapes and kinds of dtype against a layout; no value is looked at.

    Raises:
        TreeMismatchError: lists what differs.
        CheckpointError: a leaf's dtype is never converted to the stored one.
    """
    leaves, stored = flatten(params), layout.codec.leaves if layout.codec else layout.tensors
    lines = [f"  {name}: only in the result" for name in leaves.keys() - stored.keys()]
    lines += [f"  {name}: only in the layout" for name in stored.keys() - leaves.keys()]
    for name in leaves.keys() & stored.keys():
        if tuple(leaves[name].shape) != tuple(stored[name].shape):
            lines.append(f"  {name}: result {describe_leaf(leaves[name])}, layout {describe_leaf(stored[name])}")
    if lines:
        hidden = len(lines) - MAX_LINES
        lines = sorted(lines)[:MAX_LINES] + ([f"  … and {hidden} more"] if hidden > 0 else [])
        raise TreeMismatchError(
            "the result cannot be written in this layout:\n" + "\n".join(lines) + "\nEvery tensor keeps name and shape."
        )
    for name, leaf in leaves.items():
        check_castable(name, leaf, stored[name].dtype)


def write_checkpoint(
    folder: Path,
    params: Params,
    layout: Layout,
    *,
    side_files: Mapping[str, Path] | None = None,
    work: Path | None = None,
) -> None:
    """Writes all files of a checkpoint into a folder that `publish` yielded; leaf by leaf, one in memory at a time.

    Args:
        folder: Where to.
        params: Tree of the layout.
        layout: Names, order and dtypes.
        side_files: Name -> what to copy.
        work: Where `finish_shards` put the files of tensors already; they get a second name in `folder`.

    Raises:
        CheckpointError: a value does not fit the stored dtype, or a side file can no longer be read.
        OSError: the disk refused.
    """
    for file in layout.files:
        if work is not None and isinstance(file.header, safetensors.Header):
            link_file(work / SHARDS_NAME / file.name, folder / file.name)
        else:
            file.header.write(folder / file.name, _reader_of(params, layout))
    for name, data in ((layout.config_name, layout.config), (INDEX_NAME, layout.index)):
        if data is not None:
            (folder / name).write_bytes(data)
    for name, place in (side_files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with files.open_regular(place) as source, open(folder / name, "xb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


def finish_shards(work: Path, params: Params, layout: Layout) -> None:
    """Writes every safetensors file of a layout into a folder of work, but for those that a former run finished there.

    Raises:
        CheckpointError: a value does not fit the stored dtype.
        OSError: the disk refused.
    """
    leaf_of = _reader_of(params, layout)
    for file in layout.files:
        if isinstance(file.header, safetensors.Header):
            finish_file(work / SHARDS_NAME / file.name, lambda place, file=file: file.header.write(place, leaf_of))


def _reader_of(params, layout):
    """Stored name -> what to write, rounded to its dtype."""
    stored = layout.tensors
    tensor_of = layout.codec.encoder(params) if layout.codec else flatten(params).__getitem__
    return lambda name: round_to_stored(name, np.asarray(tensor_of(name)), stored[name].dtype)


def link_file(place: Path, name: Path) -> None:
    """A second name for a finished file; a copy where the file system knows no links."""
    try:
        os.link(place, name)
    except OSError:
        shutil.copyfile(place, name)


def write_extra_files(folder: Path, extra_files: Mapping[str, bytes]) -> None:
    """Writes further files beside a checkpoint; never over one of its own.

    Raises:
        OutputError: the name leads out of the folder or is taken.
        OSError: the disk refused.
    """
    for name, data in extra_files.items():
        parts = PurePosixPath(name).parts
        if not parts or not all(files.is_plain_name(part) for part in parts):
            raise OutputError(f"extra file {name!r}: not a name inside the output. Use words joined by '/'.")
        place = folder.joinpath(*parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(place, "xb") as file:
                file.write(data)
        except FileExistsError as error:
            raise OutputError(f"extra file {name!r}: the checkpoint has a file of this name. Rename it.") from error


def _describe(name, leaf):
    """Dtype and shape of a leaf as it will be stored, in the byte order of the machine."""
    dtype = np.dtype(leaf.dtype)
    return orbax.ArrayInfo(dtype if dtype.isnative else dtype.newbyteorder("="), tuple(leaf.shape))
