"""Files of an output that are filled in any order, by any number of threads and processes, and then finished."""

import json
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxtune.checkpoint import safetensors
from jaxtune.stream.checksums import combine_crc32, crc32_of_file
from jaxtune.stream.writeback import start_writing

DONE_SUFFIX, PART_SUFFIX = ".done", ".part"
BATCH = 1 << 24  # bytes of a file after which the disk is set to work


class Writer:
    """Writes parts of tensors into files that become visible under their names when they are whole.

    Attributes:
        parts: File name -> (place, length, CRC-32) of every part that was written.
        crc32: Name of a finished file -> CRC-32 of its content.

    Args:
        folder: Where they lie.
        headers: File name -> what it holds.
        sync: Whether a file's content is on the disk before it gets its name.
        is_first: Whether this process makes the files. Of several processes one does; the others open them later.
        is_alone: Whether it is the only process: then a file is finished as its last part is written, else by
            `finish`.
    """

    def __init__(
        self,
        folder: Path,
        headers: Mapping[str, safetensors.Header],
        *,
        sync: bool = True,
        is_first: bool = True,
        is_alone: bool = True,
    ):
        self._folder, self._headers, self._sync = folder, dict(headers), sync
        self._is_alone, self.is_synced = is_alone, sync
        self._file_of = {tensor: name for name, header in headers.items() for tensor in header.tensors}
        self._open: dict[str, int] = {}
        self._left = {name: _data_bytes(header) for name, header in headers.items()}
        self.crc32: dict[str, int] = {}
        self.parts: dict[str, list[tuple[int, int, int]]] = {name: [] for name in headers}
        self._behind: dict[str, list[tuple[int, int]]] = {name: [] for name in headers}
        self._lock = threading.Lock()
        if is_first:
            for name, header in headers.items():
                self._make(name, header)

    def write(self, tensor: str, low: int, values: np.ndarray) -> None:
        """Writes elements of a tensor, from element `low` on, in the dtype of the header.

        Raises:
            OSError: the disk refused.
        """
        name = self._file_of[tensor]
        header = self._headers[name]
        info = header.tensors[tensor]
        if values.dtype != info.dtype:
            raise AssertionError(f"{tensor}: {values.dtype} for a tensor of {info.dtype}")
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        place = header.data_start + info.start + low * info.dtype.itemsize
        descriptor = self._descriptor(name)
        _write_at(descriptor, data, place)
        part = (place, len(data), zlib.crc32(data))  # while it is in the cache
        with self._lock:
            self.parts[name].append(part)
            self._left[name] -= len(data)
            is_whole = self._is_alone and not self._left[name]
            behind = self._take_behind(name, place, len(data))
        if is_whole:
            self._finish(name)
        elif behind is not None:
            start_writing(descriptor, *behind)  # harmless where another thread has closed it

    def dtype_of(self, tensor: str) -> np.dtype:
        """The dtype of a tensor in its file."""
        return self._headers[self._file_of[tensor]].tensors[tensor].dtype

    def finish(self, name: str, crc: int) -> None:
        """Gives a file its name, and notes the CRC-32 of its content: from now on a later run keeps it."""
        descriptor = self._descriptor(name)
        with self._lock:
            del self._open[name]
        if self._sync:
            os.fsync(descriptor)
        os.close(descriptor)
        (self._folder / f"{name}{PART_SUFFIX}").rename(self._folder / name)
        record_finished(self._folder, name, crc)
        self.crc32[name] = crc

    def close(self) -> None:
        """Closes what is still open; of files that are not whole nothing will be kept."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def sync(self, name: str | None = None) -> None:
        """What this process wrote, into one file or all, is on the disk."""
        for other, descriptor in self._open.items():
            if self._sync and name in (None, other):
                os.fsync(descriptor)

    def _make(self, name, header):
        part = self._folder / f"{name}{PART_SUFFIX}"
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            num_bytes = header.data_start + _data_bytes(header)
            if hasattr(os, "posix_fallocate"):  # a disk without room says so now
                os.posix_fallocate(descriptor, 0, num_bytes)
            else:
                os.truncate(descriptor, num_bytes)
            _write_at(descriptor, len(header.raw).to_bytes(8, "little") + header.raw, 0)
        finally:
            os.close(descriptor)
        if self._is_alone and not _data_bytes(header):
            self._finish(name)

    def _take_behind(self, name, place, length):
        """(place, bytes) of what was written since this last was not None; None while that is little."""
        parts = self._behind[name]
        parts.append((place, place + length))
        if not self._sync or sum(high - low for low, high in parts) < BATCH:
            return None
        self._behind[name] = []
        low = min(low for low, _ in parts)
        return low, max(high for _, high in parts) - low

    def _descriptor(self, name):
        with self._lock:
            if name not in self._open:
                self._open[name] = os.open(self._folder / f"{name}{PART_SUFFIX}", os.O_WRONLY)
            return self._open[name]

    def _finish(self, name):
        self.finish(name, crc32_of_parts(self._headers[name], self.parts[name]))


def record_finished(folder: Path, name: str, crc: int) -> None:
    """Notes the CRC-32 of a finished file beside it."""
    record = folder / f"{name}{DONE_SUFFIX}"
    part = record.with_name(f"{record.name}{PART_SUFFIX}")
    part.write_text(json.dumps({"crc32": crc}))
    part.rename(record)


def crc32_of_parts(header: safetensors.Header, parts: Iterable[tuple[int, int, int]]) -> int:
    """CRC-32 of a file of which all parts behind the header are known."""
    total = zlib.crc32(len(header.raw).to_bytes(8, "little") + header.raw)
    end = header.data_start
    for place, length, crc in sorted(parts):
        if place != end:
            raise AssertionError(f"a file's parts leave a hole at {end}, or overlap: the next begins at {place}")
        total, end = combine_crc32(total, crc, length), place + length
    return total


def check_finished(folder: Path, name: str) -> int | None:
    """The CRC-32 of a file that a former run finished; None, and no file, where there is none or it has changed."""
    record = folder / f"{name}{DONE_SUFFIX}"
    if record.exists() and (folder / name).exists():
        said = json.loads(record.read_text())["crc32"]
        if crc32_of_file(folder / name) == said:
            return said
    record.unlink(missing_ok=True)
    (folder / name).unlink(missing_ok=True)
    return None


def _data_bytes(header):
    return max((info.stop for info in header.tensors.values()), default=0)


def _write_at(descriptor, data, offset):
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
