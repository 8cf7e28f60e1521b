"""Opening the files of a checkpoint as if a stranger had written them, because one has."""

import json
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from jaxtune.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # of a header, an index or a config; safetensors sets the same bound for headers

# Files that this package writes beside a result: they describe that result, not one made from it.
OWN_FILES = ("manifest.json", "report.json", "report.html")

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Weights in another form. Carried along untouched they would be the old weights beside the new ones.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".safetensors.index.json", ".bin.index.json", ".msgpack.index.json", ".npz"),
    *PICKLE_SUFFIXES,
    *(".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".tflite", ".ot", ".pb"),
)

ORBAX_MARKERS = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "_METADATA")


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; a pipe or a device would otherwise block or never end.

    Raises:
        CheckpointError: the file is missing, is not a regular file or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path}: cannot be read: {reason}. Check the path and its permissions.") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CheckpointError(f"{path}: expected a regular file, found {kind}. Remove it or name another path.")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path) -> bytes:
    """Whole content of a JSON file.

    Raises:
        CheckpointError: as `open_regular`, or the file is larger than 100 MB.
    """
    with open_regular(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, found more. Name another path."
        )
    return data


def parse_object(data: bytes, where: str, *, has_constants: bool = False) -> dict[str, Any]:
    """Parses one JSON object, strictly.

    Args:
        data: UTF-8 text.
        where: What is being parsed, as the message names it.
        has_constants: Whether NaN and Infinity, which are not JSON, may stand in it. Hugging Face writes them
            into some configs (Mamba's `time_step_limit`); a header never has them.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, a key twice in one object, or nested too deep.
    """

    def pairs(items):
        result = dict(items)
        if len(result) != len(items):
            seen = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return result

    def constant(word):
        if not has_constants:
            raise ValueError(f"{word} is not JSON")
        return float(word)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and an integer of 5000 digits are ValueErrors too
        raise CheckpointError(
            f"{where}: expected a JSON object, found text that does not parse ({error}). "
            "The file is damaged; download or write it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}. Write it again.")
    return value


def is_plain_name(name: str) -> bool:
    """Whether `name` is the name of a file in a folder: no separator, not "." or "..", nothing unprintable."""
    return bool(name) and name not in (".", "..") and name.isprintable() and not set(name) & set("/\\")


def locate(folder: Path, name: str) -> Path:
    """Path of the entry `name` of `folder`, which need not exist.

    Raises:
        CheckpointError: `name` is not a plain name, or is a symbolic link that leaves the folder.
    """
    if not is_plain_name(name):
        raise CheckpointError(
            f"{folder}: {name!r} is not the plain name of a file in this folder. "
            "Nothing outside the folder is read; correct the index."
        )
    path = folder / name
    if not _is_inside(path, folder):
        raise CheckpointError(
            f"{path}: a symbolic link that leaves the folder, to {os.path.realpath(path)}. "
            "Links are followed inside the folder (and inside a Hugging Face cache) only; copy the file in."
        )
    return path


def list_side_files(folder: Path, taken: Collection[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Every other file of a folder, to be carried along untouched.

    Args:
        folder: A checkpoint's folder.
        taken: Names at its top that are the checkpoint itself.

    Returns:
        side_files: Name relative to the folder -> where to read it.
        left_out: Name -> why it is not carried.
    """
    side_files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for root, subfolders, names in os.walk(folder):
        here = Path(root)
        for name in sorted(subfolders):
            relative = (here / name).relative_to(folder).as_posix()
            if relative in taken:
                subfolders.remove(name)
                continue
            reason = None
            if (here / name).is_symlink():
                reason = "a link to a folder"
            elif name.startswith("."):
                reason = "a hidden folder"
            elif is_orbax(here / name):
                reason = "weights in another format"
            if reason:
                subfolders.remove(name)
                left_out[relative + "/"] = reason
        subfolders.sort()
        for name in sorted(names):
            path = here / name
            relative = path.relative_to(folder).as_posix()
            if relative in taken:
                continue
            if relative in OWN_FILES:
                left_out[relative] = "describes the checkpoint it lies beside"
            elif name.lower().endswith(WEIGHT_SUFFIXES):
                left_out[relative] = "weights that are not part of this checkpoint"
            elif not _is_inside(path, folder):
                left_out[relative] = "a link that leaves the folder"
            elif not os.path.isfile(path):
                left_out[relative] = "not a regular file"
            else:
                side_files[relative] = path
    return side_files, left_out


def is_orbax(folder: Path) -> bool:
    """Whether a folder carries one of orbax's marker files; does not import orbax."""
    return any(os.path.isfile(folder / marker) for marker in ORBAX_MARKERS)


def _is_inside(path, folder):
    """Whether `path`, links followed, stays in `folder` or in the blobs of the Hugging Face cache around it."""
    real_folder = Path(os.path.realpath(folder))
    roots = [real_folder]
    # The hub's cache is models--x/snapshots/<revision>/model.safetensors -> ../../blobs/<hash>.
    # Were blobs a link itself, real paths would lie where it leads, and so not in it.
    if real_folder.parent.name == "snapshots":
        roots.append(real_folder.parent.parent / "blobs")
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(root) for root in roots)
