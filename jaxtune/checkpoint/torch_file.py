"""Files of torch.save, read without torch: the zip format, and the one before it (torch < 1.6).

Tensors come back as read-only views of the mapped file. Nothing in the file is run: its pickle is read by
`restricted_pickle` with the vocabulary of `torch_objects`.

Reference:
    https://docs.pytorch.org/docs/stable/notes/serialization.html for the zip's records; `torch/serialization.py`
    (`_legacy_save`) for the older stream: three pickles that describe it, one that holds the object, one of the
    storages' keys, then each storage as its number of elements and its bytes.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint import torch_zip
from jaxtune.checkpoint.byte_reader import DAMAGED
from jaxtune.checkpoint.files import open_regular
from jaxtune.checkpoint.restricted_pickle import MAX_BYTES, read_pickle
from jaxtune.checkpoint.torch_objects import Storage, TensorRef, find_global, load_storage
from jaxtune.checkpoint.torch_state import find_state_dict
from jaxtune.errors import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_GROWTH = 4  # tensors may be this much larger than the file, as expanded ones are
MAX_GROWTH_OF_TIES = 64  # and names of the same numbers this often repeated

_NOT_TORCH = "Expected a file that torch.save wrote. Convert others to safetensors with the library that wrote them."


@dataclass(frozen=True)
class TorchFile:
    """What one file holds.

    Attributes:
        tensors: Name -> read-only view of the mapped file, in the order of the state dict.
        ties: Name -> the earlier name of the very same numbers (one storage, one view of it).
        left_out: What else the file holds -> why it is not carried along.
    """

    tensors: dict[str, np.ndarray]
    ties: dict[str, str]
    left_out: dict[str, str]


def read_tensors(path: str | Path) -> TorchFile:
    """Reads the state dict of a .bin, .pt, .pth or .ckpt.

    The arrays are valid while the file keeps its length, as with any mapped file.

    Raises:
        CheckpointError: names the file, what was expected, what was found and what to do: the file is damaged, asks
            for code, is no state dict or several, or holds tensors that are quantised, sparse or of unknown dtype.
    """
    path = Path(path)
    with open_regular(path) as file:
        num_bytes = file.seek(0, 2)
        if not num_bytes:  # which cannot be mapped
            raise CheckpointError(f"{path}: an empty file. {_NOT_TORCH}")
        data = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    value, places = (_read_zip if data[:4] == b"PK\3\4" else _read_legacy)(str(path), data)
    refs, left_out = find_state_dict(str(path), value)
    return TorchFile(_map_tensors(path, data, refs, places), _find_ties(refs), left_out)


def _read_zip(where, data):
    """The pickled object, and key of a storage -> (start, number of bytes)."""
    records = torch_zip.read_records(where, data)
    if "data.pkl" not in records:
        raise CheckpointError(f"{where}: a zip without 'data.pkl'. {_NOT_TORCH}")
    order = records.get("byteorder")
    if order is not None and data[order.start : min(order.stop, order.start + 10)] != b"little":
        raise CheckpointError(
            f"{where}: written by a machine that is not little-endian. Load it with torch and save it again."
        )
    pickled = records["data.pkl"]
    if pickled.stop - pickled.start > MAX_BYTES:
        raise CheckpointError(f"{where}: 'data.pkl' has more than {MAX_BYTES} bytes. {DAMAGED}")
    torch_zip.check_crc(f"{where}: 'data.pkl'", data, pickled)
    value, end = read_pickle(
        data[pickled.start : pickled.stop], where, find_global=find_global, load_persistent=load_storage
    )
    if end != pickled.stop - pickled.start:
        raise CheckpointError(f"{where}: 'data.pkl' goes on after its end. {DAMAGED}")
    places = {
        name.removeprefix("data/"): (record.start, record.stop - record.start)
        for name, record in records.items()
        if name.startswith("data/")
    }
    return value, places


def _read_legacy(where, data):
    """As `_read_zip`, of the stream of pickles."""
    storages: dict[str, Storage] = {}

    def load_and_note(identity):
        storage = load_storage(identity)
        if storages.setdefault(storage.key, storage) != storage:
            raise CheckpointError(f"the storage {storage.key[:40]!r} is of two kinds. {DAMAGED}")
        return storage

    def read(position):
        return read_pickle(data, where, find_global=find_global, load_persistent=load_and_note, start=position)

    if data[:1] != b"\x80":
        kind = "a tar archive of torch < 0.2" if data[257:262] == b"ustar" else f"the bytes {data[:8]!r}"
        raise CheckpointError(f"{where}: neither a zip nor a pickle, but {kind}. {_NOT_TORCH}")
    magic, position = read(0)
    if type(magic) is not int or magic != LEGACY_MAGIC:
        raise CheckpointError(f"{where}: a pickle that torch did not write. {_NOT_TORCH}")
    protocol, position = read(position)
    system, position = read(position)
    if type(protocol) is not int or protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise CheckpointError(f"{where}: a header that is not torch's. {DAMAGED}")
    if system.get("little_endian") is not True:
        raise CheckpointError(
            f"{where}: written by a machine that is not little-endian. Load it with torch and save it again."
        )
    value, position = read(position)
    keys, position = read(position)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise CheckpointError(f"{where}: no list of storages after the object. {DAMAGED}")
    places = {}
    for key in keys:
        if key not in storages:
            raise CheckpointError(f"{where}: lists a storage {key[:40]!r} that no tensor has. {DAMAGED}")
        storage = storages[key]
        count = int.from_bytes(data[position : position + 8], "little")
        if count * (storage.dtype.itemsize if storage.dtype else 1) != storage.num_bytes:
            raise CheckpointError(f"{where}: storage {key[:40]!r}: another length than its tensors say. {DAMAGED}")
        places[key] = (position + 8, storage.num_bytes)
        position += 8 + storage.num_bytes
        if position > len(data):
            raise CheckpointError(f"{where}: storage {key[:40]!r} ends past the file, which is cut off. {DAMAGED}")
    if position != len(data):
        raise CheckpointError(f"{where}: {len(data) - position} bytes left over. {DAMAGED}")
    return value, places


def _map_tensors(path, data, refs: dict[str, TensorRef], places: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Views of the mapped file."""
    total = sum(ref.num_bytes for ref in refs.values())
    distinct = sum(ref.num_bytes for ref in set(refs.values()))
    if distinct > MAX_GROWTH * len(data) or total > MAX_GROWTH_OF_TIES * len(data):
        raise CheckpointError(
            f"{path}: its tensors would take {total} bytes, the file has {len(data)}: expanded views. In torch, call "
            ".contiguous() on them and save again."
        )
    tensors = {}
    for name, ref in refs.items():
        key = ref.storage.key
        start, num_bytes = places.get(key, (0, -1))
        if num_bytes != ref.storage.num_bytes:
            found = "none" if num_bytes < 0 else f"{num_bytes}"
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected {ref.storage.num_bytes} bytes in storage {key[:40]!r}, found "
                f"{found}. {DAMAGED}"
            )
        if not ref.num_bytes:
            tensors[name] = np.empty(ref.shape, ref.dtype)
            tensors[name].flags.writeable = False
            continue
        size = ref.dtype.itemsize
        strides = tuple(size * stride for stride in ref.strides)
        place = {"buffer": data, "offset": start + size * ref.offset, "strides": strides}
        if ref.dtype == np.bool_ and np.ndarray(ref.shape, np.uint8, **place).max() > 1:
            raise CheckpointError(f"{path}: tensor {name!r}: expected boolean bytes 0 and 1, found others. {DAMAGED}")
        tensors[name] = np.ndarray(ref.shape, ref.dtype, **place)
    return tensors


def _find_ties(refs):
    first: dict[TensorRef, str] = {}
    ties = {}
    for name, ref in refs.items():
        if ref.num_bytes and first.setdefault(ref, name) != name:
            ties[name] = first[ref]
    return ties
