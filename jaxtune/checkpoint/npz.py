"""NumPy's .npz: a zip of arrays, read without pickle and written again byte for byte.

The config of the model travels as an entry "config.json", a text or bytes array of no axes. The format cannot hold
bfloat16 or float8: NumPy writes them as raw bytes without their name, so both directions refuse them.
"""

import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint.files import open_regular
from jaxtune.errors import CheckpointError

CONFIG_ENTRY = "config.json"
DTYPES = frozenset(
    np.dtype(name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "complex64"),
    )
)

_ADVICE = "The file is damaged, or was not written by numpy.savez; write it again or convert it to safetensors."


@dataclass(frozen=True)
class Entry:
    """How one array is stored: its memory order and the zip's compression are kept to write it again."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool = False
    compression: int = zipfile.ZIP_STORED


@dataclass(frozen=True)
class Archive:
    """A checked archive.

    Attributes:
        tensors: Name -> how it is stored, in the order of the file.
        config: Text of the config, `None` where there is no such entry.
        config_entry: The config as (position among all entries, array, how it is stored).
        metadata: Always empty; other formats have some.
    """

    tensors: dict[str, Entry]
    config: bytes | None = None
    config_entry: tuple[int, np.ndarray, Entry] | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path, leaf_of: Callable[[str], np.ndarray]) -> None:
        """Writes the archive; same arrays, same bytes.

        Args:
            path: A file to create.
            leaf_of: Gives the array of a name; asked once per tensor, in order.

        Raises:
            OSError: the disk refused.
        """
        names: list[str | None] = list(self.tensors)
        if self.config_entry:
            names.insert(self.config_entry[0], None)
        with zipfile.ZipFile(path, "x") as archive:
            for name in names:
                if name is None:
                    _, array, entry = self.config_entry
                    name = CONFIG_ENTRY
                else:
                    array, entry = leaf_of(name), self.tensors[name]
                member = zipfile.ZipInfo(name + ".npy")  # dated 1980, as numpy.savez does
                member.compress_type = entry.compression
                with archive.open(member, "w", force_zip64=True) as file:
                    array = np.asarray(array, order="F" if entry.is_fortran else "C")
                    np.lib.format.write_array(file, array, allow_pickle=False)


def make_archive(tensors: Mapping[str, Any], config: bytes) -> Archive:
    """A new archive: the config first, then the tensors as given, nothing compressed.

    Raises:
        CheckpointError: a dtype that .npz cannot hold, or a tensor called like the config.
    """
    entries = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r}: .npz cannot hold {tensor.dtype} (NumPy would store it without its name). "
                'Save with format="folder" or format="safetensors".'
            )
        if name == CONFIG_ENTRY:
            raise CheckpointError(f"a tensor cannot be called {CONFIG_ENTRY!r} in .npz; rename it.")
        entries[name] = Entry(np.dtype(tensor.dtype), tuple(tensor.shape))
    array = np.array(config.decode())
    return Archive(entries, config, (0, array, Entry(array.dtype, ())))


def read_archive(path: str | Path) -> tuple[Archive, dict[str, np.ndarray]]:
    """Reads a whole archive into memory.

    Arrays stored big-endian come back in the byte order of the machine and are written so.

    Raises:
        CheckpointError: names the file, the entry, what was expected, what was found and what to do.
    """
    path = Path(path)
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _read_entries(path, archive)
        except CheckpointError:
            raise
        except Exception as error:  # zipfile and NumPy raise a dozen kinds on damaged bytes
            raise CheckpointError(f"{path}: expected a .npz archive, found {_explain(error)}. {_ADVICE}") from error


def _read_entries(path, archive):
    """All entries of an open zip."""
    entries, arrays, config_entry = {}, {}, None
    for position, member in enumerate(archive.infolist()):
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise _damaged(path, name, "only arrays, whose names end with .npy", f"{member.filename!r}")
        if name in entries or (name == CONFIG_ENTRY and config_entry):
            raise _damaged(path, name, "one entry of this name", "two")
        entry, array = _read_entry(path, name, archive, member)
        if name == CONFIG_ENTRY:
            config_entry = position, array, entry
        elif entry.dtype not in DTYPES:
            raise _damaged(path, name, f"a dtype among {', '.join(sorted(map(str, DTYPES)))}", _name_dtype(entry.dtype))
        else:
            entries[name], arrays[name] = entry, array
    return Archive(entries, _config_text(path, config_entry), config_entry), arrays


def _read_entry(path, name, archive, member):
    """One array; its size is compared with the zip's before memory is taken."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise _damaged(path, name, "version 1.0 or 2.0 of the .npy format", f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "created on Python 2": read all the same
            shape, is_fortran, dtype = read(file)
        if dtype.hasobject:
            raise _damaged(path, name, "numbers", "Python objects, which are pickled and may run code when read")
        num_bytes = dtype.itemsize * int(np.prod([1, *shape], dtype=object))
        if min((0, *shape)) < 0 or file.tell() + num_bytes != member.file_size:
            raise _damaged(
                path, name, f"{num_bytes} bytes for {dtype}{list(shape)}", f"{member.file_size - file.tell()}"
            )
        data = file.read(num_bytes)
        if len(data) != num_bytes or file.read(1):
            raise _damaged(path, name, f"{num_bytes} bytes of data", "another number")
    array = np.ndarray(shape, dtype, data, order="F" if is_fortran else "C")
    if dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise _damaged(path, name, "boolean bytes 0 and 1", "others")
    array = array.astype(dtype.newbyteorder("="), copy=False)
    is_fortran = bool(is_fortran and not array.flags.c_contiguous)  # NumPy's own choice when both hold
    return Entry(array.dtype, tuple(shape), is_fortran, member.compress_type), array


def _config_text(path, config_entry):
    """The config's text, from a text or bytes array of no axes."""
    if config_entry is None:
        return None
    _, array, entry = config_entry
    if array.shape != () or entry.dtype.kind not in "US":
        raise _damaged(path, CONFIG_ENTRY, "a text or bytes array of no axes", f"{array.dtype}{list(array.shape)}")
    return array.item().encode() if entry.dtype.kind == "U" else array.item()


def _name_dtype(dtype):
    if dtype.kind == "V":
        return f"{dtype.str}, raw bytes (bfloat16 and float8 lose their name in .npz; convert from the original)"
    return str(dtype)


def _explain(error):
    return f"{type(error).__name__}: {error}"


def _damaged(path, name, expected, found):
    return CheckpointError(f"{path}: entry {name!r}: expected {expected}, found {found}. {_ADVICE}")
