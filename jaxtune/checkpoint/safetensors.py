"""The safetensors format: a strict memory-mapped reader and a writer of reproducible bytes.

A file is the length of the header (8 bytes, little-endian), the header (one JSON object, padded with spaces),
and the data. The header maps every tensor's name to its dtype, shape and place in the data; `__metadata__` maps
strings to strings. Nothing here trusts a byte of it.

Reference:
    https://github.com/huggingface/safetensors#format. Stricter: keys beside dtype, shape and data_offsets are
    refused, and so are boolean bytes other than 0 and 1.
"""

import json
import math
import mmap
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.checkpoint.files import MAX_JSON_BYTES, open_regular, parse_object
from jaxtune.errors import CheckpointError, TreeMismatchError
from jaxtune.tree import describe_leaf

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_AXES = 32

_ADVICE = "The file is damaged or was not written by a safetensors library; download or convert it again."


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor; `start` and `stop` count bytes from the beginning of the data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: Name -> what is stored, in the order of the data.
        metadata: The strings under `__metadata__`.
        raw: The JSON with its padding, kept so that a file can be written again byte for byte.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        """Bytes before the data."""
        return 8 + len(self.raw)

    def write(self, path: Path, leaf_of: Callable[[str], np.ndarray]) -> None:
        """Writes the file this header describes.

        Args:
            path: A file to create.
            leaf_of: Gives the array of a name; asked once per tensor, in order, so that one is held at a time.

        Raises:
            TreeMismatchError: an array has another shape or dtype than the header says.
            OSError: the disk refused.
        """
        with open(path, "xb") as file:
            file.write(len(self.raw).to_bytes(8, "little"))
            file.write(self.raw)
            for name, info in self.tensors.items():
                leaf = leaf_of(name)
                if leaf.shape != info.shape or leaf.dtype != info.dtype:
                    raise TreeMismatchError(
                        f"{path}: tensor {name!r}: the header says {describe_leaf(info)}, got {describe_leaf(leaf)}. "
                        "Round to the stored dtype first."
                    )
                file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def make_header(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Header:
    """Header of a new file.

    Args:
        tensors: Name -> anything with a dtype and a shape, in the order the data shall have.
        metadata: Strings for `__metadata__`; written in sorted order.

    Raises:
        CheckpointError: a dtype or a name that the format does not have.
    """
    if "__metadata__" in tensors:
        raise CheckpointError("a tensor cannot be called '__metadata__' in safetensors; rename it.")
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    infos, offset = {}, 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        if dtype not in NAMES:
            raise CheckpointError(
                f"tensor {name!r}: safetensors has no dtype {dtype}. Cast it to one of: {', '.join(map(str, NAMES))}."
            )
        infos[name] = TensorInfo(dtype, tuple(tensor.shape), offset, offset + _count_bytes(dtype, tensor.shape))
        offset = infos[name].stop
        content[name] = {
            "dtype": NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [infos[name].start, infos[name].stop],
        }
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data starts at a multiple of 8
    return Header(infos, dict(metadata or {}), raw)


def read_header(path: str | Path) -> Header:
    """Reads and checks the header alone; the data is not touched, only its length compared.

    Raises:
        CheckpointError: names the file, the tensor, what was expected, what was found and what to do.
    """
    path = Path(path)
    with open_regular(path) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        return _read_header(path, file, num_bytes)


def read_tensors(path: str | Path) -> tuple[Header, dict[str, np.ndarray]]:
    """Reads a file as read-only arrays that are views of the mapped file: nothing is copied.

    The arrays are valid while the file keeps its length; a file cut short by someone else while it is mapped
    ends the process (SIGBUS), as with any mapped file.

    Raises:
        CheckpointError: as `read_header`, or a boolean byte is neither 0 nor 1.
    """
    path = Path(path)
    with open_regular(path) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        header = _read_header(path, file, num_bytes)
        mapped = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    arrays = {}
    for name, info in header.tensors.items():
        offset = header.data_start + info.start
        if info.dtype == np.bool_:
            data = np.ndarray(info.shape, np.uint8, buffer=mapped, offset=offset)
            if data.size and data.max() > 1:
                raise _damaged(path, f"tensor {name!r}", "boolean bytes 0 and 1", f"the byte {data.max()}")
        arrays[name] = np.ndarray(info.shape, info.dtype, buffer=mapped, offset=offset)
    return header, arrays


def _read_header(path, file, num_bytes):
    """Reads the header from the beginning of an open file of `num_bytes` bytes."""
    if num_bytes < 8:
        raise _damaged(path, "length of the file", "at least 8 bytes", f"{num_bytes}")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_JSON_BYTES:
        raise _damaged(path, "length of the header", f"at most {MAX_JSON_BYTES} bytes", f"{length}")
    if 8 + length > num_bytes:
        raise _damaged(
            path,
            "length of the header",
            f"at most the {num_bytes - 8} bytes after it",
            f"{length}: the file is cut off",
        )
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise _damaged(path, "header", "a JSON object that starts with '{'", repr(raw[:20]))
    content = parse_object(raw, f"{path}: header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__", "an object of strings", reprlib.repr(metadata))
    infos = {name: _read_plain(name, entry) or _check_entry(path, name, entry) for name, entry in content.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_coverage(path, infos, num_bytes - 8 - length)
    return Header(infos, metadata, raw)


def _read_plain(name, entry):
    """What `_check_entry` gives, at a third of the time, for an entry in which nothing is wrong or uncommon; else None.

    Of 50,000 tensors the time is felt.
    """
    if not name.isascii() or type(entry) is not dict or len(entry) != 3:
        return None
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(dtype) is not str or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        return None
    dtype, (start, stop) = DTYPES.get(dtype), offsets
    if dtype is None or type(start) is not int or type(stop) is not int or start < 0 or len(shape) > MAX_AXES:
        return None
    num_bytes = dtype.itemsize
    for size in shape:
        if type(size) is not int or size < 1:
            return None
        num_bytes *= size
    if num_bytes >= 2**63 or stop - start != num_bytes:
        return None
    return TensorInfo(dtype, tuple(shape), start, stop)


def _check_entry(path, name, entry):
    """One tensor's entry of the header, or an error that names it."""
    what = f"tensor {name!r}"
    _check_name(path, name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, what, "an object of dtype, shape and data_offsets", reprlib.repr(entry))
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise _damaged(path, f"{what}: dtype", f"one of {', '.join(DTYPES)}", reprlib.repr(entry["dtype"]))
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise _damaged(path, f"{what}: shape", f"at most {MAX_AXES} integers, none negative", reprlib.repr(shape))
    # NumPy multiplies the sizes of the other axes even where one is 0, and fails past 63 bits.
    if dtype.itemsize * math.prod(max(size, 1) for size in shape) >= 2**63:
        raise _damaged(path, f"{what}: shape", "fewer than 2^63 bytes", reprlib.repr(shape))
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{what}: data_offsets", "two integers, begin and end", reprlib.repr(offsets))
    needed = _count_bytes(dtype, shape)
    if offsets[1] - offsets[0] != needed:
        raise _damaged(
            path, f"{what}: data_offsets", f"{needed} bytes for {dtype}{shape}", f"{offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), *offsets)


def _check_name(path, name):
    """A name must survive being written again."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise _damaged(path, "name of a tensor", "Unicode text", repr(name)) from error


def _check_coverage(path, infos, num_bytes):
    """The tensors must tile the data: no overlap, no hole, nothing past the end, nothing left over."""
    end, last = 0, "the beginning of the data"
    for name, info in infos.items():
        if info.start != end:
            kind = "an overlap" if info.start < end else "a hole"
            raise _damaged(
                path, f"tensor {name!r}: data_offsets", f"to start at {end}, after {last}", f"{info.start}: {kind}"
            )
        end, last = info.stop, f"tensor {name!r}"
        if end > num_bytes:
            raise _damaged(
                path,
                f"{last}: data_offsets",
                f"to end within the {num_bytes} bytes of data",
                f"{end}: the file is cut off",
            )
    if end != num_bytes:
        raise _damaged(path, "length of the data", f"{end} bytes, the end of {last}", f"{num_bytes}: bytes left over")


def _are_sizes(value):
    """Whether a parsed value is a list of integers that are not negative; `True` is not an integer here."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _count_bytes(dtype, shape):
    return dtype.itemsize * math.prod(shape)


def _damaged(path, what, expected, found):
    return CheckpointError(f"{path}: {what}: expected {expected}, found {found}. {_ADVICE}")
