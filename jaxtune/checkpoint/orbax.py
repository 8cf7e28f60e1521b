"""Orbax checkpoints of nested dicts of arrays, read to host memory.

Orbax stamps times and random file names into what it writes: a checkpoint written again holds equal arrays in
equal structure, not equal bytes.
"""

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint.safetensors import NAMES
from jaxtune.errors import CheckpointError
from jaxtune.tree import unflatten


@dataclass(frozen=True)
class ArrayInfo:
    """Dtype and shape of one stored array."""

    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OrbaxTree:
    """What an orbax folder holds: name -> array, in orbax's order. `metadata` is always empty."""

    tensors: dict[str, ArrayInfo]
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path, leaf_of: Callable[[str], np.ndarray]) -> None:
        """Writes the tree as an orbax checkpoint; all of it is in memory at once.

        Raises:
            OSError: the disk refused; orbax reports it as text, from which the number is taken.
        """
        from orbax.checkpoint import v1 as ocp

        try:
            ocp.save(Path(os.path.abspath(path)), unflatten({name: leaf_of(name) for name in self.tensors}))
        except ValueError as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def make_tree(tensors: Mapping[str, Any]) -> OrbaxTree:
    """A new checkpoint.

    Raises:
        CheckpointError: a leaf of size 0, which orbax refuses, or a dtype that is not read back.
    """
    infos = {}
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            raise CheckpointError(
                f"tensor {name!r}: orbax cannot hold an empty array, {tensor.dtype}{list(tensor.shape)}. "
                'Save with format="folder".'
            )
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"tensor {name!r}: {tensor.dtype} is not read back. Cast it to a float or integer.")
        infos[name] = ArrayInfo(np.dtype(tensor.dtype), tuple(tensor.shape))
    return OrbaxTree(infos)


def read_tree(path: str | Path) -> tuple[OrbaxTree, dict[str, np.ndarray]]:
    """Reads an orbax checkpoint as NumPy arrays, wherever its arrays lived when it was saved.

    Raises:
        CheckpointError: not an orbax checkpoint, damaged, or holds something else than nested dicts of arrays.
    """
    from orbax.checkpoint import v1 as ocp

    path = Path(os.path.abspath(path))
    _check_links(path)
    with _translated(path):
        stored = ocp.metadata(path).metadata
    if not isinstance(stored, Mapping):  # orbax logs why it could not read the tree, and goes on with None
        raise _damaged(path, "a nested dict of arrays", type(stored).__name__)
    infos = {name: _check_leaf(path, name, leaf) for name, leaf in _walk(path, stored)}
    # An abstract tree of NumPy arrays asks for NumPy arrays; without one, orbax restores the devices it saved from.
    abstract = unflatten({name: np.broadcast_to(np.empty((), info.dtype), info.shape) for name, info in infos.items()})
    with _translated(path):
        loaded = ocp.load(path, abstract)
    return OrbaxTree(infos), dict(_walk(path, loaded))


def _walk(path, node, prefix=""):
    """Yields every (name, leaf) of a nested dict; refuses keys that would not come back as they are."""
    for key, value in node.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise _damaged(
                path, "keys that are non-empty strings without '/'", f"{key!r} under {prefix or 'the root'!r}"
            )
        if isinstance(value, Mapping):
            yield from _walk(path, value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _check_leaf(path, name, leaf):
    """Dtype and shape of a leaf that is an array of a known dtype."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise _damaged(path, "a nested dict of arrays alone", f"{type(leaf).__name__} at {name!r}")
    if leaf.dtype not in NAMES:
        raise _damaged(path, f"a dtype among {', '.join(map(str, NAMES))}", f"{leaf.dtype} at {name!r}")
    return ArrayInfo(np.dtype(leaf.dtype), tuple(leaf.shape))


def _check_links(path):
    """No link in an orbax folder may leave it."""
    real = Path(os.path.realpath(path))
    for root, folders, names in os.walk(path):
        for name in (*folders, *names):
            entry = Path(root) / name
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(real):
                raise CheckpointError(f"{entry}: a symbolic link that leaves the checkpoint; copy the file in.")


@contextlib.contextmanager
def _translated(path):
    """Orbax and tensorstore raise many kinds on damaged folders; the caller sees one."""
    try:
        yield
    except Exception as error:
        raise _damaged(
            path, "an orbax checkpoint", f"{type(error).__name__}: {str(error).split(' [', 1)[0]}"
        ) from error


def _damaged(path, expected, found):
    return CheckpointError(
        f"{path}: expected {expected}, found {found}. The checkpoint is damaged or holds more than parameters; "
        "save the parameters alone with orbax.checkpoint.v1.save(path, params)."
    )
