"""Torch files built byte by byte, so that they can be hostile, and without torch."""

import io
import pickle
import struct
import zipfile

import numpy as np

PROTOCOL = b"\x80\x02"
STOP = b"."


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value):
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(full):
    """GLOBAL."""
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def many(*items):
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
    """REDUCE."""
    return name(function) + many(*arguments) + b"R"


def storage(key="0", count=6, kind="torch.FloatStorage"):
    return many(text("storage"), name(kind), text(key), text("cpu"), integer(count)) + b"Q"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, **place):
    sizes = [many(*map(integer, values)) for values in (shape, strides)]
    hooks = name("collections.OrderedDict") + b")R"
    return call("torch._utils._rebuild_tensor_v2", storage(**place), integer(offset), *sizes, b"\x89", hooks)


def state(**items):
    """A whole pickle of a dict, name -> opcodes."""
    return PROTOCOL + b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u" + STOP


def archive(pickled, storages=None, *, folder="archive", compression=zipfile.ZIP_STORED, **others):
    """A zip as torch.save lays it out."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        records = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"} | others
        records |= {f"data/{key}": data for key, data in (storages or {}).items()}
        for record, data in records.items():
            if data is not None:
                file.writestr(f"{folder}/{record}", data)
    return out.getvalue()


def archive64(records, out=None):
    """The same with all sizes and places in their 64-bit forms; a record given by its length is a hole."""
    out = out or io.BytesIO()
    entries = []
    for record, data in records.items():
        raw, start = f"archive/{record}".encode(), out.tell()
        size = data if isinstance(data, int) else len(data)
        out.write(struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(raw), 20))
        out.write(raw + struct.pack("<HHQQ", 1, 16, size, size))
        out.seek(size, io.SEEK_CUR) if isinstance(data, int) else out.write(data)
        unset = (2**32 - 1,)
        entry = struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, *unset * 2, len(raw), 36, 0, 0, 0, 0, *unset
        )
        entries.append(entry + raw + struct.pack("<HHIHHQQQ", 9, 4, 0, 1, 24, size, size, start))
    start, directory = out.tell(), b"".join(entries)
    end = start + len(directory)
    out.write(directory)
    out.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *[len(records)] * 2, len(directory), start))
    out.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
    out.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0))
    return out.getvalue() if isinstance(out, io.BytesIO) else None


def stream(pickled, storages=None):
    """A file as torch < 1.6 wrote it."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, system))
    keys = pickle.dumps(list(storages or {}), 2)
    tail = b"".join(struct.pack("<q", len(data) // 4) + data for data in (storages or {}).values())
    return head + pickled + keys + tail


SIX = np.arange(6, dtype=np.float32)
GOOD = archive(state(w=tensor()), {"0": SIX.tobytes()})
