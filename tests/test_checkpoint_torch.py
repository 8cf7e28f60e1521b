"""Files of torch.save against torch itself, and against files built byte by byte; nothing in them is ever run."""

import argparse
import collections
import hashlib
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_files import (
    GOOD,
    PROTOCOL,
    SIX,
    STOP,
    archive,
    archive64,
    call,
    integer,
    many,
    name,
    state,
    storage,
    stream,
    tensor,
    text,
)

from jaxtune import checkpoint
from jaxtune.checkpoint import restricted_pickle, torch_zip
from jaxtune.checkpoint.torch_file import read_tensors
from jaxtune.checkpoint.torch_objects import DTYPES
from jaxtune.errors import CheckpointError

BASE = {"0": SIX.tobytes()}
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def bytes_of(tensor):
    """The numbers of a torch tensor, whatever their dtype."""
    import torch

    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, array in found.items():
        assert array.shape == tuple(expected[key].shape), key
        assert array.dtype == DTYPES[str(expected[key].dtype).removeprefix("torch.")], key
        assert array.tobytes() == bytes_of(expected[key]), key
        assert not array.flags.writeable


def write(path, data):
    path.write_bytes(data)
    return path


def refused(path, data, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_tensors(write(path, data))
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what torch writes


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_is_read(tmp_path, torch, dtype, legacy):
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    raw = torch.randint(0, 256, (24 * DTYPES[dtype].itemsize,), dtype=torch.uint8)
    if dtype == "bool":
        raw = raw % 2
    values = raw.view(getattr(torch, dtype)).reshape(2, 3, 4)
    given = {"w": values, "scalar": values[1, 1, 1], "empty": values[:0]}
    torch.save(given, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(read_tensors(tmp_path / "a.pt").tensors, given)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_every_view_is_read(tmp_path, torch, protocol, legacy):
    whole = torch.arange(24.0).reshape(4, 6)
    given = {
        "whole": whole,
        "transposed": whole.t(),
        "slice": whole[1:3, 2:5],
        "steps": whole[::2, ::3],
        "expanded": whole[0, :2].expand(3, 2),
        "long_axis_of_one": whole[:1].t().contiguous().t(),
        "ünïcode.weight": torch.ones(1),
    }
    torch.save(given, tmp_path / "a.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    file = read_tensors(tmp_path / "a.bin")
    assert_same(file.tensors, given)
    assert file.ties == {}
    assert file.left_out == {}


def test_tensors_are_views_of_the_mapped_file(tmp_path, torch):
    torch.save({"w": torch.ones(1000), "v": torch.ones(3)}, tmp_path / "a.pt")
    array = read_tensors(tmp_path / "a.pt").tensors["w"]
    assert not array.flags.owndata
    assert array.flags.aligned
    assert type(array.base).__name__ == "mmap"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_module_s_state_dict_is_read_with_its_ties(tmp_path, torch, legacy):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    tied = torch.nn.Linear(3, 4)
    tied.weight = model[0].weight
    model.append(tied)
    torch.save(model.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    file = read_tensors(tmp_path / "a.pt")
    assert_same(file.tensors, model.state_dict())
    assert file.ties == {"3.weight": "0.weight"}
    assert file.tensors["1.num_batches_tracked"].shape == ()


def test_parameters_and_tensors_with_attributes_are_tensors(tmp_path, torch):
    plain, marked, strange = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3)), torch.ones(4)
    marked.note = {"a": 1}
    strange.note = "x"
    given = {"plain": plain, "marked": marked, "strange": strange}
    for protocol in (2, 4):
        torch.save(given, tmp_path / "a.pt", pickle_protocol=protocol)
        assert_same(read_tensors(tmp_path / "a.pt").tensors, given)


def test_files_without_checksums_are_read(tmp_path, torch):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read_tensors(tmp_path / "a.pt").tensors, {"w": torch.ones(3)})


def test_storages_of_a_gpu_and_of_python_2_are_read(tmp_path):
    items = b"](" + many(text("w"), tensor(kind="torch.cuda.FloatStorage")) + b"e"
    pickled = PROTOCOL + call("collections.OrderedDict", items) + STOP
    np.testing.assert_array_equal(
        read_tensors(write(tmp_path / "a", archive(pickled, BASE))).tensors["w"], SIX.reshape(2, 3)
    )


# --- state dicts among other things


def test_what_a_training_run_saves_is_read_and_the_rest_is_said(tmp_path, torch):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    given = {
        "epoch": 3,
        "state_dict": torch.nn.DataParallel(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, path="x"),
        "metric": np.float64(0.5),
        "milestones": collections.Counter([1, 2]),
        "history": np.arange(3.0),
        "groups": {1, 2},
        "loss": torch.tensor(0.5),
        "bad\x1b[2J": None,
    }
    torch.save(given, tmp_path / "a.pt")
    file = read_tensors(tmp_path / "a.pt")
    assert_same(file.tensors, model.state_dict())
    assert file.left_out["epoch"] == "no tensor but int"
    assert file.left_out["optimizer"] == "no tensor but dict"
    assert file.left_out["args"] == "no tensor but argparse.Namespace"
    assert file.left_out["loss"] == "a tensor beside the state dict"
    assert file.left_out["module."].startswith("prefix of every name")
    assert len(file.left_out) == len(given)
    assert "\x1b" not in str(file.left_out.keys())


def test_a_prefix_goes_only_where_every_name_has_it(tmp_path, torch):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    assert list(read_tensors(tmp_path / "a.pt").tensors) == ["module.a", "b"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda t: {"state_dict": {"a": t}, "state_dict_ema": {"a": t}}, "several dicts of tensors: 'state_dict', "),
        (lambda t: {"teacher": {"a": t}, "b": t}, "several dicts of tensors: 'teacher' and the file itself"),
        (lambda t: t, "expected a state dict, tensors by name, found TensorRef"),
        (lambda t: [t], "found list"),
        (lambda t: {}, "holds no tensor. In torch"),
        (lambda t: {"a": 1, "b": {"c": {"d": t}}}, "holds no tensor at its top or one dict below"),
        (lambda t: {1: t}, "expected names of tensors, found int"),
    ],
)
def test_what_is_no_single_state_dict_is_refused(tmp_path, torch, make, match):
    torch.save(make(torch.ones(2)), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", (tmp_path / "a.pt").read_bytes(), match)


# --- tensors of other kinds


def quantised(torch):
    return {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}


def sparse(torch):
    return {"w": torch.eye(3).to_sparse()}


def conjugate(torch):
    return {"w": torch.ones(2, dtype=torch.complex64).conj()}


def meta(torch):
    return {"w": torch.ones(2, device="meta")}


def module(torch):
    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (quantised, "_rebuild_qtensor: a quantised tensor. In torch, save dense tensors"),
        (sparse, "_rebuild_sparse_tensor: a sparse tensor"),
        (conjugate, "a conjugate or negative view"),
        (meta, "asks for|meta device|storage"),
        (module, "asks for 'torch.nn.modules.linear.Linear'.*Nothing of it was run"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_tensors_are_refused_by_name(tmp_path, torch, make, match):
    torch.save(make(torch), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", (tmp_path / "a.pt").read_bytes(), match)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path, torch):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "a.pt"))
    refused(tmp_path / "a.pt", (tmp_path / "a.pt").read_bytes(), "a TorchScript program, not a state dict")


# --- hostile pickles


class Trap:
    """Unpickled, it would end the test run."""

    def __reduce__(self):
        return (exec, ("import os; os._exit(1)",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_is_refused_by_name_and_never_run(tmp_path, protocol):
    pickled = pickle.dumps({"w": Trap()}, protocol)
    match = "asks for '(builtins|__builtin__).exec'.*this file can run code"
    refused(tmp_path / "a.pt", archive(pickled), match)
    refused(tmp_path / "a.pt", stream(pickled), match)


NEW_RECORD = name("collections.OrderedDict") + b")R"
LONG_LIST = b"](" + b"K\0" * 1000 + b"eq\1"
HOSTILE = {
    "os_system": (call("os.system", text("id")), "asks for 'os.system'"),
    "stack_global": (text("os") + text("system") + b"\x93" + many(text("id")) + b"R", "asks for 'os.system'"),
    "global_of_parts": (text("builtins") + text("dict.update") + b"\x93", "asks for 'builtins.dict.update'"),
    "global_named_by_int": (integer(1) + integer(2) + b"\x93", "the name of a global as text"),
    "torch_load": (call("torch.storage._load_from_bytes", b"C\0"), "asks for 'torch.storage._load_from_bytes'"),
    "torch_hub": (call("torch.hub.load", text("x")), "asks for 'torch.hub.load'"),
    "escape_in_name": (b"cos\x1b[2J\nx\n", r"asks for 'os\\x1b\[2J.x'"),
    "long_name": (b"c" + b"a" * 2000 + b"\nx\n", "a name of at most 1000 bytes"),
    "new_object": (name("os.system") + many(text("id")) + b"\x81", "asks for 'os.system'"),
    "new_object_of_function": (name("torch._utils._rebuild_tensor_v2") + b")\x81", "makes an object of torch._utils"),
    "extension": (b"\x82\1", "none that files of tensors use"),
    "dup": (b"K\1002", "none that files of tensors use"),
    "next_buffer": (b"\x97", "none that files of tensors use"),
    "text_protocol": (b"I1\n", "none that files of tensors use"),
    "instance": (b"(ios\nsystem\n", "none that files of tensors use"),
    "object": (b"(cos\nsystem\no", "asks for 'os.system'"),
    "calls_a_number": (integer(1) + b")R", "calls int with tuple"),
    "calls_with_a_list": (name("torch.Size") + b"]R", "calls torch.Size with list"),
    "calls_a_dtype": (name("torch.float32") + b")R", "calls torch.float32"),
    "calls_a_storage_type": (name("torch.FloatStorage") + many(integer(2**40)) + b"R", "calls torch.FloatStorage"),
    "too_many_arguments": (call("torch.Size", many(), many(), many()), "calls torch.Size with 3 arguments"),
    "builds_a_tensor": (tensor() + b"}b", "sets the attributes of TensorRef"),
    "builds_a_plain_dict": (b"}}b", "sets the attributes of dict"),
    "builds_a_class": (name("collections.OrderedDict") + b"}b", "sets the attributes of collections.OrderedDict"),
    "builds_a_storage": (storage() + b"}b", "sets the attributes of Storage"),
    "sets_items_of_a_tensor": (tensor() + b"(K\1K\2u", "sets items of TensorRef"),
    "appends_to_a_tuple": (b")K\1a", "adds items to tuple"),
    "extends_a_dict": (b"}(K\1e", "adds items to dict"),
    "adds_to_a_dict": (b"}(K\1\x90", "adds 1 items to dict"),
    "odd_items": (b"}(K\1u", "a key that has no value"),
    "tuple_as_key": (b"}(" + many(integer(1)) + b"K\1u", "as the key of a dict, found tuple"),
    "list_as_key": (b"}(]K\1u", "as the key of a dict, found list"),
    "huge_key": (b"}(" + integer(2**61 - 1) + b"K\1u", "a small integer as the key"),
    "float_as_key": (b"}(G" + bytes(8) + b"K\1u", "as the key of a dict, found float"),
    "huge_integer": (b"\x8b" + (2**20).to_bytes(4, "little") + bytes(2**20), "an integer of at most 64 bytes"),
    "no_mark": (b"t", "takes arguments where none begin"),
    "no_values": (b"\x87", "a key that has no value|makes a tuple of 3 from"),
    "empty_memo": (b"h\7", "the memo's entry 7"),
    "bad_text": (b"X\1\0\0\0\xff", "expected UTF-8 text"),
    "surrogate": (b"X\3\0\0\0\xed\xa0\x80", "expected UTF-8 text"),
    "text_past_end": (b"X\xff\xff\xff\x7f", "more bytes, found the end"),
    "text_far_past_end": (b"\x8d" + b"\xff" * 8, "more bytes, found the end"),
    "frame_past_end": (b"\x95" + b"\xff" * 8, "longer than the file"),
    "protocol": (b"\x80\6", "protocol 2, 3, 4 or 5, found 6"),
    "two_values": (b"N" * 3 + b"K\1(K\2K\3", "sets items of int|one value at its end"),
    "record_of_numbers": (call("collections.OrderedDict", b"](K\1K\2e"), "an ordered dict of pairs"),
    "record_with_hostile_keys": (call("collections.OrderedDict", b"](" + many(b"]", b"N") + b"e"), "of text and value"),
    "persistent_of_text": (text("x") + b"Q", "a persistent id of a storage, found str"),
    "persistent_module": (many(*[text("module")] * 5) + b"Q", "a persistent id of a storage"),
    "storage_of_no_type": (many(text("storage"), name("torch.float32"), *[text("0")] * 3) + b"Q", "a type of storage"),
    "negative_storage": (storage(count=-1), "key, device and size"),
    "huge_storage": (storage(count=2**100), "key, device and size"),
    "quantised_storage": (storage(kind="torch.QInt8Storage"), "a quantised storage"),
    "shape_of_text": (call("torch._utils._rebuild_tensor_v2", storage(), integer(0), text("ab"), text("ab")), "shape"),
    "negative_shape": (tensor(shape=(-1, 3)), "none negative"),
    "negative_stride": (tensor(strides=(-3, 1)), "none negative"),
    "negative_offset": (tensor(offset=-1), "an offset and one stride"),
    "bool_shape": (
        call("torch._utils._rebuild_tensor_v2", storage(), integer(0), many(b"\x88"), many(b"\x88")),
        "none negative",
    ),
    "many_axes": (tensor(shape=(1,) * 65, strides=(1,) * 65), "at most 32 integers"),
    "one_stride": (tensor(strides=(1,)), "2 axes, 1 strides"),
    "past_storage": (tensor(shape=(2, 4)), "reaches element 6 of a storage of 6"),
    "offset_past_storage": (tensor(offset=1), "reaches element 6"),
    "strides_past_storage": (tensor(strides=(4, 1)), "reaches element 6"),
    "huge_strides": (tensor(strides=(2**62, 2**62)), "of a storage of 6"),
    "huge_shape": (tensor(shape=(2**40, 2**40), strides=(0, 0)), "fewer than 2\\^63 bytes"),
    "huge_empty_shape": (tensor(shape=(0, 2**62), strides=(0, 0)), "fewer than 2\\^63 bytes"),
    "expanded_bomb": (tensor(shape=(2**30, 2), strides=(0, 1)), "would take 85899346[0-9]+ bytes"),
    "v2_on_bytes": (tensor(kind="torch.storage.UntypedStorage"), "a tensor on a typed storage"),
    "tensor_on_text": (call("torch._utils._rebuild_tensor_v2", *[text("x")] * 4), "a tensor on a typed storage"),
    "parameter_of_text": (call("torch._utils._rebuild_parameter", text("x"), b"\x88", b"N"), "made of a tensor"),
    "type_of_another": (
        call("torch._tensor._rebuild_from_type_v2", name("torch.Size"), name("torch.Tensor"), b")", b"N"),
        "a torch.Tensor with attributes",
    ),
    "missing_storage": (tensor(key="7"), "expected 24 bytes in storage '7', found none"),
    "short_storage": (tensor(count=7), "expected 28 bytes in storage '0', found 24"),
    "storage_elsewhere": (tensor(key="../../../etc/passwd"), "found none"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name(tmp_path, case):
    opcodes, match = HOSTILE[case]
    good = text("good") + tensor()
    for pickled in (state(good=tensor(), bad=opcodes), PROTOCOL + b"}(" + good + text("bad") + opcodes + b"u."):
        message = refused(tmp_path / "a.pt", archive(pickled, BASE), match)
        assert "\x1b" not in message


def test_nesting_as_deep_as_the_file_is_long_ends(tmp_path):
    for opcodes in (b"]" * 50_000 + b"a" * 49_999, b"(" * 50_000 + b"t" * 50_000, b")" + b"\x85" * 100_000):
        file = read_tensors(write(tmp_path / "a.pt", archive(state(w=tensor(), deep=opcodes), BASE)))
        assert list(file.tensors) == ["w"]
        refused(tmp_path / "a.pt", archive(PROTOCOL + opcodes + STOP, BASE), "expected a state dict")


def test_a_list_that_holds_itself_ends(tmp_path):
    file = read_tensors(write(tmp_path / "a.pt", archive(state(w=tensor(), loop=b"]q\1h\1a"), BASE)))
    assert file.left_out == {"loop": "no tensor but list"}


def test_small_files_cannot_ask_for_much(tmp_path, monkeypatch):
    # A tuple that doubles forty times is forty tuples; a walk over it would never end.
    doubling = b"K\1\x85" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(1, 41))
    assert read_tensors(write(tmp_path / "a.pt", archive(state(w=tensor(), laughs=doubling), BASE)))
    # One dict named many times is looked through once.
    shared = b"}(" + b"".join(integer(n) + b"N" for n in range(5000)) + b"uq\1"
    names = b"".join(text(str(n)) + b"h\1" for n in range(5000))
    pickled = PROTOCOL + b"}(" + text("w") + tensor() + text("shared") + shared + names + b"u."
    assert list(read_tensors(write(tmp_path / "a.pt", archive(pickled, BASE))).tensors) == ["w"]
    monkeypatch.setattr(restricted_pickle, "MAX_OPCODES", 20_000)
    refused(tmp_path / "a.pt", archive(state(w=b"N0" * 10_001 + b"N"), BASE), "at most 20000 opcodes")
    copies = LONG_LIST + (b"0" + name("torch.Size") + b"h\1\x85R") * 21
    refused(tmp_path / "a.pt", archive(state(w=copies), BASE), "at most 20000 values in arguments")
    monkeypatch.setattr(restricted_pickle, "MAX_BYTES", 100)
    refused(tmp_path / "a.pt", archive(state(w=text("a" * 100)), BASE), "the file is cut off, or this part")


def test_names_that_repeat_one_tensor_cannot_ask_for_much(tmp_path):
    names = b"".join(text(str(n)) + b"h\1" for n in range(3000))
    pickled = PROTOCOL + b"}(" + text("w") + tensor(shape=(3000,), strides=(1,), count=3000) + b"q\1" + names + b"u."
    refused(tmp_path / "a.pt", archive(pickled, {"0": bytes(12000)}), "would take 36012000 bytes")


def test_boolean_bytes_are_zero_or_one(tmp_path):
    pickled = state(w=tensor(kind="torch.BoolStorage"))
    refused(tmp_path / "a.pt", archive(pickled, {"0": b"\0\1\0\2\0\1"}), "tensor 'w': expected boolean bytes 0 and 1")


# --- hostile zips


def patched(data, at, value):
    return data[:at] + value + data[at + len(value) :]


DIRECTORY = GOOD.index(b"PK\1\2")
END = GOOD.index(b"PK\5\6")
SECOND = GOOD.index(b"PK\1\2", DIRECTORY + 4)


def twice():
    raw = archive(state(w=tensor()), BASE, **{"data/1": SIX.tobytes()})
    return raw.replace(b"data/1", b"data/0")


ZIPS = {
    "no_pickle": (archive(None, BASE), "a zip without 'data.pkl'"),
    "compressed": (archive(state(w=tensor()), BASE, compression=zipfile.ZIP_DEFLATED), "found compressed ones"),
    "bomb": (archive(state(w=tensor()), {"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED), "compressed ones"),
    "size_lies": (patched(GOOD, DIRECTORY + 24, (10**9).to_bytes(4, "little")), "found compressed ones"),
    "encrypted": (patched(GOOD, DIRECTORY + 8, b"\1"), "found encrypted ones"),
    "header_elsewhere": (patched(GOOD, SECOND + 42, (1).to_bytes(4, "little")), "expected a header at byte 1"),
    "header_outside": (patched(GOOD, SECOND + 42, b"\xfe\xff\xff\xff"), "a header at byte 4294967294"),
    "same_header_twice": (patched(GOOD, SECOND + 42, bytes(4)), "the same name and method in both headers"),
    "size_outside": (patched(patched(GOOD, DIRECTORY + 20, b"\xff" * 3), DIRECTORY + 24, b"\xff" * 3), "its end at"),
    "overlap": (patched(GOOD, DIRECTORY + 20, bytes([GOOD[DIRECTORY + 20] + 1, 0, 0, 0]) * 2), "an overlap"),
    "twice": (twice(), "'archive/data/0': expected once, found twice"),
    "bad_name": (GOOD.replace(b"data/0", b"data/\xff"), "name of a record: expected UTF-8 text"),
    "name_leads_out": (GOOD.replace(b"data/0", b"../../"), "printable words joined by"),
    "absolute_name": (GOOD.replace(b"archive/", b"/rchive/"), "printable words joined by"),
    "backslash": (GOOD.replace(b"data/0", b"data\\0"), "printable words joined by"),
    "two_folders": (GOOD.replace(b"archive/data/0", b"another/data/0"), "one folder of records"),
    "no_folder": (GOOD.replace(b"archive/", b"archive_"), "one folder of records"),
    "many_entries": (patched(GOOD, END + 8, b"\xff" * 4), "an entry at byte"),
    "few_entries": (patched(GOOD, END + 8, b"\1\0\1\0"), "1 entries in .* bytes left over"),
    "split": (patched(GOOD, END + 4, b"\1"), "a part of a split archive"),
    "directory_outside": (patched(GOOD, END + 16, b"\xff" * 3), "central directory: expected within"),
    "no_end": (GOOD[:END], "none: the file is cut off"),
    "comment": (GOOD + b"x", "a comment of 0 bytes"),
    "checksum": (patched(GOOD, DIRECTORY + 16, b"\1\2\3\4"), "checksum: expected 04030201, found"),
    "big_endian": (archive(state(w=tensor()), BASE, byteorder=b"big"), "not little-endian"),
    "trailing_pickle": (archive(state(w=tensor()) + b"N.", BASE), "'data.pkl' goes on after its end"),
    "unset_sizes": (patched(GOOD, DIRECTORY + 24, b"\xff" * 4), "64-bit sizes in its extra field"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_a_hostile_zip_is_refused_by_name(tmp_path, case):
    data, match = ZIPS[case]
    assert data != GOOD
    refused(tmp_path / "a.pt", data, match)


def test_too_many_records_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_zip, "MAX_RECORDS", 3)
    refused(tmp_path / "a.pt", GOOD, "number of records: expected at most 3, found 4")


def test_64_bit_sizes_and_places_are_read(tmp_path):
    data = archive64({"data.pkl": state(w=tensor()), "data/0": SIX.tobytes()})
    np.testing.assert_array_equal(read_tensors(write(tmp_path / "a.pt", data)).tensors["w"], SIX.reshape(2, 3))
    for stop in range(len(data)):
        refused(tmp_path / "a.pt", data[:stop], str(tmp_path))
    refused(tmp_path / "a.pt", data.replace(b"PK\6\6", b"PK\6\5"), "a 64-bit end record, found none")


def test_records_past_4_gib_are_found(tmp_path):
    """A file with a hole of 5 GiB before its second storage."""
    count = 5 * 2**28
    pickled = state(w=tensor(shape=(count,), strides=(1,), count=count), v=tensor(key="1"))
    path = write(tmp_path / "a.pt", b"")
    try:
        with open(path, "r+b") as file:
            archive64({"data.pkl": pickled, "data/0": 4 * count, "data/1": SIX.tobytes()}, file)
    except OSError:
        pytest.skip("this file system has no files with holes")
    tensors = read_tensors(path).tensors
    assert tensors["w"].shape == (count,)
    assert tensors["w"][-1] == 0
    np.testing.assert_array_equal(tensors["v"], SIX.reshape(2, 3))


# --- the older stream


STREAM = stream(state(w=tensor()), BASE)
STREAMS = {
    "not_torch": (pickle.dumps({"w": 1}, 2), "a pickle that torch did not write"),
    "no_pickle": (b"hello there", "neither a zip nor a pickle, but the bytes b'hello th'"),
    "tar": (b"x" * 257 + b"ustar" + bytes(300), "a tar archive of torch < 0.2"),
    "big_endian": (STREAM.replace(b"\x88s", b"\x89s").replace(b"\x88X", b"\x89X"), "not little-endian"),
    "left_over": (STREAM + b"x", "1 bytes left over"),
    "cut": (STREAM[:-1], "ends past the file, which is cut off"),
    "other_count": (patched(STREAM, len(STREAM) - 32, b"\7"), "another length than its tensors say"),
    "keys": (stream(state(w=tensor()), {}), "expected 24 bytes in storage '0', found none"),
    "unknown_key": (stream(state(w=tensor()), BASE | {"9": b"1234"}), "lists a storage '9' that no tensor has"),
    "two_kinds": (
        stream(state(w=tensor(), v=tensor(kind="torch.IntStorage")), BASE),
        "the storage '0' is of two kinds",
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_hostile_stream_is_refused_by_name(tmp_path, case):
    data, match = STREAMS[case]
    refused(tmp_path / "a.pt", data, match)


# --- every prefix, and flips


def small_files():
    return {"zip": GOOD, "stream": STREAM}


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_every_prefix_of_a_file_is_refused(tmp_path, kind):
    data = small_files()[kind]
    for stop in range(len(data)):
        refused(tmp_path / "a.pt", data[:stop], str(tmp_path))


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_every_flipped_bit_outside_the_numbers_is_refused_or_changes_nothing_silently(tmp_path, kind):
    """A zip's pickle has a checksum; in the older stream a flip may rename a tensor or move its view, no more."""
    data = small_files()[kind]
    numbers = data.index(SIX.tobytes())
    num_refused = 0
    for position in range(len(data)):
        if numbers <= position < numbers + SIX.nbytes:
            continue
        bad = bytearray(data)
        bad[position] ^= 1 << position % 8
        try:
            tensors = read_tensors(write(tmp_path / "a.pt", bytes(bad))).tensors
        except CheckpointError:
            num_refused += 1
            continue
        if kind == "zip":
            assert list(tensors) == ["w"]
            np.testing.assert_array_equal(tensors["w"], SIX.reshape(2, 3))
        else:
            (array,) = tensors.values()
            assert array.size <= SIX.size
    assert num_refused > len(data) / 4


# --- as checkpoints


def save_model(folder, model, name="pytorch_model.bin"):
    import torch

    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / name)
    model.config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tiny_gpt2(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 6}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes))


def test_transformers_loads_what_is_written_of_a_bin(tmp_path, torch):
    model = tiny_gpt2()
    found = checkpoint.load(save_model(tmp_path / "in", model))
    assert found.format == "torch"
    assert found.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert found.left_out == {
        "pytorch_model.bin": "a pickle, which is read and never written: its tensors are stored as model.safetensors",
        "pytorch_model.bin: lm_head.weight": "tied to transformer.wte.weight, which stands for it",
    }
    assert "lm_head.weight" not in found.params
    out = checkpoint.save(tmp_path / "out", found.params, like=found)
    assert set(os.listdir(out)) == {"config.json", "manifest.json", "model.safetensors", "tokenizer.json"}
    again, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert_same(checkpoint.load(out).params, {key: again.state_dict()[key] for key in checkpoint.load(out).params})


def test_untied_by_its_config_every_name_is_kept(tmp_path, torch):
    model = tiny_gpt2(tie_word_embeddings=False)
    model.lm_head.weight = model.transformer.wte.weight  # by chance; transformers will not tie them again
    found = checkpoint.load(save_model(tmp_path / "in", model))
    assert found.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert found.params.keys() == model.state_dict().keys()
    again, info = type(model).from_pretrained(
        checkpoint.save(tmp_path / "out", found.params, like=found), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_shards_become_shards(tmp_path, torch):
    model = tiny_gpt2()
    folder = save_model(tmp_path / "in", model)
    whole = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    names = list(whole)
    names.remove("lm_head.weight")
    shards = {
        "pytorch_model-00001-of-00002.bin": [*names[:5], "lm_head.weight"],
        "pytorch_model-00002-of-00002.bin": names[5:],
    }
    for shard, held in shards.items():
        torch.save({key: whole[key] for key in held}, folder / shard)
    weight_map = {key: shard for shard, held in shards.items() for key in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    found = checkpoint.load(folder)
    assert found.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert checkpoint.hash_checkpoint(found).keys() == {*shards, INDEX, *found.side_files, "config.json"}
    out = checkpoint.save(tmp_path / "out", found.params, like=found)
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= set(os.listdir(out))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == set(names)
    assert index["metadata"]["total_size"] == sum(whole[key].nbytes for key in names)
    again, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(again.state_dict()[key], whole[key]) for key in whole)
    for shard in ("../x.bin", "/etc/x.bin", "a/b.bin"):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"stolen": shard}}))
        with pytest.raises(CheckpointError, match="not the plain name of a file in this folder"):
            checkpoint.load(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"stolen": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"tensor 'stolen': expected a \.bin of this folder"):
        checkpoint.load(folder)


def test_safetensors_beside_a_pickle_are_preferred(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(GOOD)
    found = checkpoint.load(tmp_path, config={})
    assert found.format == "folder"
    assert found.params["w"].shape == (2,)
    assert found.left_out == {"pytorch_model.bin": "weights that are not part of this checkpoint"}


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("resnet50.pth", "resnet50.safetensors"),
        ("last.CKPT", "last.safetensors"),
        ("model.pt", "model.safetensors"),
    ],
)
def test_files_and_folders_are_recognised_and_hashed(tmp_path, name, written):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(GOOD)
    (folder / "training_args.bin").write_bytes(b"\x80\x02.")
    (folder / "optimizer.pt").write_bytes(b"\x80\x02.")
    (folder / "config.json").write_text('{"model_type": "x"}')
    for path in (folder, folder / name):
        found = checkpoint.load(path)
        np.testing.assert_array_equal(found.params["w"], SIX.reshape(2, 3))
        assert found.config == {"model_type": "x"}
        assert found.layout.num_bytes == 24
        digest = hashlib.sha256(GOOD).hexdigest()
        described = checkpoint.describe_checkpoint(found)
        assert described["sha256"][name] == digest
        assert described["left_out"][name].endswith(f"are stored as {written}")
        out = checkpoint.save(tmp_path / f"out{path == folder}", found.params, like=found)
        assert set(os.listdir(out)) == {"config.json", "manifest.json", written}
    assert checkpoint.load(folder).left_out["optimizer.pt"] == "weights that are not part of this checkpoint"


def test_several_torch_files_are_ambiguous(tmp_path):
    for each in ("a.pt", "b.pth"):
        (tmp_path / each).write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"2 torch files but no .*: 'a\.pt', 'b\.pth'\. Name one"):
        checkpoint.load(tmp_path, config={})
    assert checkpoint.load(tmp_path / "a.pt", config={}).params["w"].shape == (2, 3)


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path):
    pickled = state(w=tensor(kind="torch.ComplexDoubleStorage"))
    (tmp_path / "a.pt").write_bytes(archive(pickled, {"0": bytes(96)}))
    with pytest.raises(CheckpointError, match=r"a\.pt: tensor 'w': safetensors has no dtype complex128"):
        checkpoint.load(tmp_path / "a.pt", config={})


def test_names_must_still_be_paths(tmp_path):
    (tmp_path / "a.pt").write_bytes(archive(state(**{"a\x1b[2J": tensor()}), BASE))
    with pytest.raises(CheckpointError, match="expected printable words joined by '/'"):
        checkpoint.load(tmp_path / "a.pt", config={})


def test_bfloat16_goes_through_byte_for_byte(tmp_path, torch):
    given = {"w": torch.randn(3, 4).to(torch.bfloat16)}
    torch.save(given, tmp_path / "a.pt")
    found = checkpoint.load(tmp_path / "a.pt", config={})
    assert found.params["w"].dtype == ml_dtypes.bfloat16
    out = checkpoint.save(tmp_path / "out", found.params, like=found)
    assert checkpoint.load(out, config={}).params["w"].tobytes() == bytes_of(given["w"])
