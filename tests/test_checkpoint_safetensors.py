"""The format against the reference library both ways, and against files built byte by byte."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors as reference

from jaxtune.checkpoint.safetensors import DTYPES, make_header, read_header, read_tensors
from jaxtune.errors import CheckpointError, TreeMismatchError

# The reference library's names of dtypes, which its NumPy front end does not all know.
KNOWN_TO_BOTH = sorted(set(DTYPES) - {"C64"})


def build(header, data=b"", *, length=None):
    """A file from its parts; `header` is JSON-able or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def random_array(dtype, shape, seed=0):
    """Every bit pattern but NaN's, so that equality can be asked of the bytes."""
    random = np.random.RandomState(seed)
    if dtype == np.bool_:
        return np.asarray(random.rand(*shape) > 0.5)
    return np.asarray(random.randint(0, 100, shape)).astype(dtype)


def write(path, tensors, metadata=None):
    header = make_header(tensors, metadata)
    header.write(path, tensors.__getitem__)
    return header


def as_spec(array):
    return reference.TensorSpec(
        dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
    )


@pytest.mark.parametrize("code", KNOWN_TO_BOTH)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (1,)], ids=str)
def test_the_reference_library_reads_ours(tmp_path, code, shape):
    array = random_array(DTYPES[code], shape)
    write(tmp_path / "a.safetensors", {"x/y": array}, {"b": "2", "a": "ä"})
    ((name, found),) = reference.deserialize((tmp_path / "a.safetensors").read_bytes())
    assert (name, found["dtype"], tuple(found["shape"])) == ("x/y", code, shape)
    assert bytes(found["data"]) == array.tobytes()
    with reference.safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert file.metadata() == {"a": "ä", "b": "2"}


@pytest.mark.parametrize("code", KNOWN_TO_BOTH)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (1,)], ids=str)
def test_we_read_the_reference_library(tmp_path, code, shape):
    array = random_array(DTYPES[code], shape)
    reference.serialize_file({"x": as_spec(array)}, tmp_path / "a.safetensors", {"k": "v"})
    header, tensors = read_tensors(tmp_path / "a.safetensors")
    assert header.metadata == {"k": "v"}
    assert tensors["x"].dtype == array.dtype
    assert tensors["x"].shape == shape
    assert tensors["x"].tobytes() == array.tobytes()


def test_whole_files_are_the_reference_librarys_byte_for_byte(tmp_path):
    arrays = {
        code: random_array(DTYPES[code], (n + 1,)) for n, code in enumerate(["F64", "F32", "I32", "BF16", "U8", "BOOL"])
    }
    theirs = bytes(reference.serialize({name: as_spec(array) for name, array in arrays.items()}, {"format": "ä"}))
    (tmp_path / "theirs").write_bytes(theirs)
    order = list(read_header(tmp_path / "theirs").tensors)
    write(tmp_path / "ours", {name: arrays[name] for name in order}, {"format": "ä"})
    assert (tmp_path / "ours").read_bytes() == theirs


def test_complex_numbers_come_back(tmp_path):
    array = np.array([1 + 2j, -3j], np.complex64)
    write(tmp_path / "a", {"x": array})
    np.testing.assert_array_equal(read_tensors(tmp_path / "a")[1]["x"], array)


def test_same_input_same_bytes_whatever_the_order_of_metadata_or_memory(tmp_path):
    array = random_array(np.float32, (4, 6))
    write(tmp_path / "a", {"x": array}, {"p": "1", "q": "2"})
    write(tmp_path / "b", {"x": np.asfortranarray(array)}, {"q": "2", "p": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_keep_the_order_given(tmp_path):
    names = ["z", "a", "m"]
    write(tmp_path / "a", {name: np.ones(2, np.float32) for name in names})
    assert list(read_header(tmp_path / "a").tensors) == names


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    write(tmp_path / "a", {"x": random_array(np.float32, (8,))})
    array = read_tensors(tmp_path / "a")[1]["x"]
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert type(array.base).__name__ == "mmap"


def test_an_unaligned_header_is_read(tmp_path):
    array = np.array([1.5, -2.0], np.float32)
    raw = json.dumps({"x": entry()}).encode()
    raw += b" " * (3 - len(raw) % 8 + 8)
    (tmp_path / "a").write_bytes(build(raw, array.tobytes()))
    header, tensors = read_tensors(tmp_path / "a")
    assert header.data_start % 4
    np.testing.assert_array_equal(tensors["x"], array)


def test_the_header_alone_is_read_from_a_file_far_larger_than_memory(tmp_path):
    count = 2**40  # 4 TiB, all of it a hole of the file system
    raw = build({"x": entry(shape=(count,), offsets=(0, 4 * count))})
    path = tmp_path / "huge.safetensors"
    path.write_bytes(raw)
    try:
        os.truncate(path, len(raw) + 4 * count)
    except OSError:
        pytest.skip("this file system has no files of 4 TiB")
    assert read_header(path).tensors["x"].shape == (count,)


def test_a_file_without_tensors_is_a_file(tmp_path):
    write(tmp_path / "a", {})
    assert read_tensors(tmp_path / "a")[1] == {}
    assert reference.deserialize((tmp_path / "a").read_bytes()) == []


GOOD = np.array([1.5, -2.0], np.float32).tobytes()
HOSTILE = {
    "empty": (b"", "at least 8 bytes"),
    "no_header": (b"\1\0\0", "at least 8 bytes"),
    "length_past_file": (build({"x": entry()}, GOOD, length=10_000), "cut off"),
    "length_huge": (b"\xff" * 8 + b"{}", "at most 100000000 bytes"),
    "length_zero": (build(b""), "starts with '{'"),
    "not_json": (build(b"{nonsense}"), "does not parse"),
    "not_object": (build([1]), "starts with '{'"),
    "leading_space": (build(b" {}"), "starts with '{'"),
    "not_utf8": (build(b'{"\xff":1}'), "does not parse"),
    "nested_too_deep": (build(b'{"a":' * 100_000), "does not parse"),
    "long_integer": (build(b'{"a":' + b"9" * 5000 + b"}"), "does not parse"),
    "not_a_number": (build(b'{"a":NaN}'), "NaN is not JSON"),
    "duplicate_tensor": (build(b'{"x":1,"x":2}'), "'x' stands twice"),
    "duplicate_field": (build(b'{"x":{"dtype":"F32","dtype":"F32"}}'), "'dtype' stands twice"),
    "metadata_not_object": (build({"__metadata__": [1]}), "an object of strings"),
    "metadata_not_strings": (build({"__metadata__": {"a": 1}}), "an object of strings"),
    "entry_not_object": (build({"x": 3}), "tensor 'x': expected an object of dtype"),
    "entry_lacks_field": (build({"x": {"dtype": "F32", "shape": [2]}}), "tensor 'x': expected an object of dtype"),
    "entry_has_more": (build({"x": entry() | {"more": "x"}}, GOOD), "tensor 'x': expected an object of dtype"),
    "unknown_dtype": (build({"x": entry("F4")}, GOOD), "tensor 'x': dtype: expected one of"),
    "dtype_not_string": (build({"x": entry([1])}, GOOD), "tensor 'x': dtype: expected one of"),
    "negative_shape": (build({"x": entry(shape=(-2,))}, GOOD), "none negative"),
    "float_shape": (build({"x": entry(shape=(2.0,))}, GOOD), "none negative"),
    "bool_shape": (build({"x": entry(shape=(True, 2))}, GOOD), "none negative"),
    "text_shape": (build({"x": entry() | {"shape": "ab"}}, GOOD), "none negative"),
    "too_many_axes": (build({"x": entry(shape=(1,) * 33, offsets=(0, 4))}, GOOD[:4]), "at most 32 integers"),
    "shape_overflows": (build({"x": entry(shape=(2**62, 2**62))}, GOOD), "fewer than 2\\^63 bytes"),
    "empty_shape_overflows": (build({"x": entry(shape=(0, 2**62, 8), offsets=(0, 0))}), "fewer than 2\\^63 bytes"),
    "one_offset": (build({"x": entry(offsets=(0,))}, GOOD), "two integers"),
    "negative_offset": (build({"x": entry(offsets=(-8, 0))}, GOOD), "two integers"),
    "offsets_swapped": (build({"x": entry(offsets=(8, 0))}, GOOD), "two integers"),
    "wrong_byte_count": (build({"x": entry(shape=(3,))}, GOOD), "12 bytes for float32\\[3\\], found 8"),
    "overlap": (
        build({"x": entry(), "y": entry(offsets=(4, 12))}, GOOD + GOOD),
        "'y'.*start at 8.*found 4: an overlap",
    ),
    "same_bytes_twice": (build({"x": entry(), "y": entry()}, GOOD), "an overlap"),
    "hole": (build({"x": entry(), "y": entry(offsets=(12, 20))}, GOOD * 3), "'y'.*start at 8.*found 12: a hole"),
    "hole_at_start": (build({"x": entry(offsets=(8, 16))}, GOOD * 2), "start at 0.*a hole"),
    "truncated": (build({"x": entry()}, GOOD[:-1]), "within the 7 bytes of data, found 8: the file is cut off"),
    "trailing": (build({"x": entry()}, GOOD + b"!"), "8 bytes, the end of tensor 'x', found 9"),
    "lone_surrogate": (build(b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"), "Unicode text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_by_name(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    for read in (read_header, read_tensors):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_boolean_bytes_are_zero_or_one(tmp_path):
    (tmp_path / "a").write_bytes(build({"x": entry("BOOL", (3,), (0, 3))}, b"\0\1\2"))
    with pytest.raises(CheckpointError, match="tensor 'x': expected boolean bytes 0 and 1, found the byte 2"):
        read_tensors(tmp_path / "a")


def test_what_is_not_a_regular_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="a pipe, socket or device"):
        read_header(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="found a folder"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "none")


def test_header_and_arrays_must_agree_when_written(tmp_path):
    header = make_header({"x": np.ones((2, 3), np.float32)})
    with pytest.raises(TreeMismatchError, match=r"'x': the header says float32\[2, 3\], got float32\[3, 2\]"):
        header.write(tmp_path / "a", lambda _: np.ones((3, 2), np.float32))
    with pytest.raises(TreeMismatchError, match="got bfloat16"):
        header.write(tmp_path / "b", lambda _: np.ones((2, 3), ml_dtypes.bfloat16))


@pytest.mark.parametrize("array", [np.ones(2, ">f4"), np.ones(2, np.complex128), np.array(["a"])], ids=str)
def test_dtypes_that_the_format_lacks_are_refused(array):
    with pytest.raises(CheckpointError, match="tensor 'x': safetensors has no dtype"):
        make_header({"x": array})


def test_the_name_of_the_metadata_is_taken():
    with pytest.raises(CheckpointError, match="__metadata__"):
        make_header({"__metadata__": np.ones(2, np.float32)})


def test_one_corrupt_byte_never_surprises(tmp_path):
    """300 single-byte corruptions: refused by name, or read exactly as the reference library reads it."""
    arrays = {"block_0/kernel": random_array(np.float32, (2, 3)), "count": random_array(np.int32, (4,), 1)}
    write(tmp_path / "good", arrays, {"format": "jaxtune"})
    good = (tmp_path / "good").read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    random = np.random.RandomState(0)
    num_read = 0
    for _ in range(300):
        bad = bytearray(good)
        bad[random.randint(header_bytes)] = random.randint(256)
        (tmp_path / "bad").write_bytes(bad)
        try:
            tensors = read_tensors(tmp_path / "bad")[1]
        except CheckpointError:
            continue
        num_read += 1
        theirs = dict(reference.deserialize(bytes(bad)))
        assert tensors.keys() == theirs.keys()
        for name, array in tensors.items():
            assert DTYPES[theirs[name]["dtype"]] == array.dtype
            assert tuple(theirs[name]["shape"]) == array.shape
            assert bytes(theirs[name]["data"]) == array.tobytes()
        assert sorted(array.tobytes() for array in tensors.values()) == sorted(a.tobytes() for a in arrays.values())
    assert 0 < num_read < 150  # a letter of a name may change unnoticed; the structure may not
