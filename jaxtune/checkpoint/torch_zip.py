"""The zip archives of torch.save: where each record lies in the file, and nothing unpacked.

torch stores its records uncompressed, so a record is a range of the file. Only such archives are read; everything that
a zip may be beside that (compressed, encrypted, split, with entries that overlap, lie outside, or stand twice) is
refused, and so a small file cannot pretend to be a large one.

Reference:
    PKWARE, APPNOTE.TXT 6.3: the end of central directory (4.3.16), its 64-bit form (4.3.14), the entries (4.3.12).
"""

import mmap
import struct
import zlib
from dataclasses import dataclass

from jaxtune.checkpoint.byte_reader import DAMAGED
from jaxtune.errors import CheckpointError

MAX_RECORDS = 100_000
MAX_COMMENT = 65_535

_END = struct.Struct(
    "<4sHHHHIIH"
)  # signature, disk, disk of the directory, entries here, entries, size, offset, comment
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_UNSET = 0xFFFFFFFF  # the value is in the 64-bit extra field


@dataclass(frozen=True)
class Record:
    """One record: its bytes are `start:stop` of the file. `crc` is 0 where torch was told not to compute it."""

    start: int
    stop: int
    crc: int


def read_records(where: str, data: mmap.mmap) -> dict[str, Record]:
    """Every record of an archive, by its name without the archive's own folder.

    Args:
        where: The file, for messages.
        data: The whole file.

    Raises:
        CheckpointError: names what is damaged, hostile or not torch's.
    """
    count, directory, size = _find_directory(where, data)
    if count > MAX_RECORDS:
        raise _damaged(where, "number of records", f"at most {MAX_RECORDS}", str(count))
    entries, position, stop = [], directory, directory + size
    for _ in range(count):
        name, entry, position = _read_entry(where, data, position, stop, directory)
        entries.append((name, *entry))
    if position != stop:
        raise _damaged(where, "central directory", f"{count} entries in {size} bytes", "bytes left over")
    _refuse_overlap(where, entries)
    return _strip_folder(where, entries)


def check_crc(where: str, data: mmap.mmap, record: Record) -> None:
    """Compares the checksum of a record that is read whole (the pickle: a flipped bit there renames a tensor).

    Raises:
        CheckpointError: they differ.
    """
    found = zlib.crc32(data[record.start : record.stop])
    if record.crc not in (0, found):
        raise _damaged(where, "checksum", f"{record.crc:08x}", f"{found:08x}")


def _find_directory(where, data):
    """Number of entries, start and size of the central directory."""
    lowest = max(0, len(data) - _END.size - MAX_COMMENT)
    place = data.rfind(b"PK\5\6", lowest)
    if place < 0 or place + _END.size > len(data):
        raise _damaged(where, "end of the archive", "a zip's end record", "none: the file is cut off")
    _, disk, first_disk, here, count, size, directory, comment = _END.unpack_from(data, place)
    if disk or first_disk or here != count:
        raise _damaged(where, "archive", "one file", "a part of a split archive")
    if place + _END.size + comment != len(data):
        raise _damaged(where, "end of the archive", f"a comment of {comment} bytes", "another length")
    end = place
    locator = place - _LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\6\7":
        _, disk, end, disks = _LOCATOR.unpack_from(data, locator)
        if disk or disks > 1 or end + _END64.size > locator or data[end : end + 4] != b"PK\6\6":
            raise _damaged(where, "end of the archive", "a 64-bit end record", "none where it should be")
        _, _, _, _, disk, first_disk, here, count, size, directory = _END64.unpack_from(data, end)
        if disk or first_disk or here != count:
            raise _damaged(where, "archive", "one file", "a part of a split archive")
    if directory + size > end:
        raise _damaged(where, "central directory", f"within {end} bytes", f"{directory} + {size}")
    return count, directory, size


def _read_entry(where, data, position, stop, directory):
    """One entry of the central directory: name, (start of its header, record), and where the next one begins."""
    if position + _ENTRY.size > stop or data[position : position + 4] != b"PK\1\2":
        raise _damaged(where, "central directory", f"an entry at byte {position}", "none")
    fields = _ENTRY.unpack_from(data, position)
    flags, method, crc, packed, size, name_size, extra_size, comment_size = (
        fields[i] for i in (3, 4, 7, 8, 9, 10, 11, 12)
    )
    disk, header = fields[13], fields[16]
    position += _ENTRY.size
    if position + name_size + extra_size + comment_size > stop:
        raise _damaged(where, "central directory", "whole entries", "one that is cut off")
    raw_name = data[position : position + name_size]
    name = _read_name(where, raw_name)
    extra = data[position + name_size : position + name_size + extra_size]
    size, packed, header = _read_extra(where, name, extra, size, packed, header)
    if name.partition("/")[2].startswith(("code/", "constants.pkl")):
        raise CheckpointError(
            f"{where}: a TorchScript program, not a state dict. In torch: "
            "torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    if flags & 0x2041:  # encrypted, strongly encrypted, masked
        raise _damaged(where, f"record {name!r}", "plain bytes", "encrypted ones")
    if method or packed != size:
        raise CheckpointError(
            f"{where}: record {name!r}: expected stored bytes, as torch writes them, found compressed ones (method "
            f"{method}, {packed} for {size}). Unpack the archive and pack it without compression, or save with torch."
        )
    if disk:
        raise _damaged(where, "archive", "one file", "a part of a split archive")
    if header + _LOCAL.size > directory or data[header : header + 4] != b"PK\3\4":
        raise _damaged(where, f"record {name!r}", f"a header at byte {header}", "none")
    local = _LOCAL.unpack_from(data, header)
    start = header + _LOCAL.size + local[9] + local[10]
    if local[3] != method or data[header + _LOCAL.size : header + _LOCAL.size + local[9]] != raw_name:
        raise _damaged(where, f"record {name!r}", "the same name and method in both headers", "others")
    if start + size > directory:
        raise _damaged(
            where, f"record {name!r}", f"within the {directory} bytes of records", f"its end at {start + size}"
        )
    return name, (header, Record(start, start + size, crc)), position + name_size + extra_size + comment_size


def _read_name(where, raw):
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise _damaged(where, "name of a record", "UTF-8 text", repr(raw[:80])) from error
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise _damaged(where, "name of a record", "printable words joined by '/'", repr(name[:80]))
    return name


def _read_extra(where, name, extra, size, packed, header):
    """64-bit sizes and offset where the 32-bit ones are unset."""
    wanted = [value == _UNSET for value in (size, packed, header)]
    position = 0
    while any(wanted) and position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1 and position + 4 + length <= len(extra) and length >= 8 * sum(wanted):
            values = iter(struct.unpack_from(f"<{sum(wanted)}Q", extra, position + 4))
            return tuple(
                next(values) if is_wanted else value
                for is_wanted, value in zip(wanted, (size, packed, header), strict=True)
            )
        position += 4 + length
    if any(wanted):
        raise _damaged(where, f"record {name!r}", "64-bit sizes in its extra field", "none")
    return size, packed, header


def _refuse_overlap(where, entries):
    """No byte may belong to two records, and no name stand twice."""
    seen, end, last = set(), 0, ""
    for name, header, record in sorted(entries, key=lambda entry: entry[1]):
        if name in seen:
            raise _damaged(where, f"record {name!r}", "once", "twice")
        seen.add(name)
        if header < end:
            raise _damaged(where, f"record {name!r}", f"after the end of {last!r}", "an overlap")
        end, last = record.stop, name


def _strip_folder(where, entries):
    """torch puts all records into one folder, called as the file once was."""
    folders = {name.split("/")[0] for name, _, _ in entries}
    if len(folders) != 1 or any("/" not in name for name, _, _ in entries):
        shown = ", ".join(repr(name[:40]) for name in sorted(folders)[:5]) or "nothing"
        raise _damaged(where, "archive", "one folder of records", shown)
    return {name.split("/", 1)[1]: record for name, _, record in entries}


def _damaged(where, what, expected, found):
    return CheckpointError(f"{where}: {what}: expected {expected}, found {found}. {DAMAGED}")
