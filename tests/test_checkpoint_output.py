"""What is written: layouts, dtypes, one rounding, and what is refused before a byte is on disk."""

import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors as reference
from safetensors.numpy import save_file

from jaxtune import checkpoint
from jaxtune.checkpoint.output import FORMATS
from jaxtune.checkpoint.rounding import round_to_stored
from jaxtune.errors import CheckpointError, OutputError, TreeMismatchError, UnknownNameError
from jaxtune.tree import flatten, map_leaves

CONFIG = {"model_type": "jaxtune_mlp", "width": 3, "name": "ä"}
PARAMS = {
    "up": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float16)},
    "mask": np.array([True, False, True]),
    "block_10": {"scale": np.array(2.0, np.float32)},
    "block_2": {"count": np.array([1, 2], np.int64)},
}


def store(root, dtype, value=1.0):
    """A target of one tensor "w" stored as `dtype`."""
    root.mkdir()
    checkpoint.save(root / "a", {"w": np.full(4, value, dtype)}, config={})
    return checkpoint.load(root / "a")


@pytest.mark.parametrize("format", FORMATS)
def test_a_fresh_checkpoint_comes_back(tmp_path, format):
    out = checkpoint.save(tmp_path / "out", PARAMS, config=CONFIG, format=format)
    found = checkpoint.load(out)
    assert found.config == CONFIG
    assert found.format == ("folder" if format == "safetensors" else format)
    expected, actual = flatten(PARAMS), flatten(found.params)
    assert expected.keys() == actual.keys()
    for name, leaf in expected.items():
        assert actual[name].dtype == leaf.dtype
        np.testing.assert_array_equal(actual[name], leaf)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "orbax"])
def test_one_file_alone_is_a_checkpoint_where_its_config_is_inside(tmp_path, format):
    out = checkpoint.save(tmp_path / "out", PARAMS, config=CONFIG, format=format)
    (file,) = [*out.glob("model.*")]
    if format == "folder":  # beside it
        assert file.with_name("config.json").exists()
    else:
        assert [path.name for path in out.iterdir() if path != file] == ["manifest.json"]
    assert checkpoint.load(file).config == CONFIG


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "orbax"])
def test_same_input_same_bytes(tmp_path, format):
    outs = [checkpoint.save(tmp_path / name, PARAMS, config=CONFIG, format=format) for name in "ab"]
    for path in outs[0].iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (outs[1] / path.name).read_bytes()


def test_fresh_tensors_are_aligned_and_in_natural_order(tmp_path):
    out = checkpoint.save(tmp_path / "out", PARAMS, config=CONFIG)
    with reference.safe_open(out / "model.safetensors", framework="numpy") as file:
        names = file.offset_keys()
    assert names == ["block_2/count", "block_10/scale", "up/kernel", "up/bias", "mask"]
    with pytest.raises(TypeError, match="needs a config"):
        checkpoint.save(tmp_path / "b", PARAMS)
    with pytest.raises(UnknownNameError, match=r"unknown checkpoint format 'orbx'. Did you mean 'orbax'\?"):
        checkpoint.save(tmp_path / "b", PARAMS, config=CONFIG, format="orbx")
    with pytest.raises(CheckpointError, match="no leaf"):
        checkpoint.save(tmp_path / "b", {}, config=CONFIG)


def test_jax_arrays_are_written_and_rounded_to_the_targets_dtype(tmp_path):
    target = store(tmp_path / "t", ml_dtypes.bfloat16)
    values = jax.random.normal(jax.random.key(0), (4,))
    out = checkpoint.save(tmp_path / "out", {"w": values}, like=target)
    found = checkpoint.load(out).params["w"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, np.asarray(values.astype(jnp.bfloat16)))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.float16, 70000.0), (ml_dtypes.bfloat16, 3.4e38), (ml_dtypes.float8_e4m3fn, 500.0), (np.float32, 1e39)],
    ids=str,
)
def test_overflow_names_the_tensor_and_publishes_nothing(tmp_path, dtype, value):
    target = store(tmp_path / "t", dtype)
    params = {"w": np.array([1.0, value, 2.0, -value])}
    with pytest.raises(CheckpointError, match=f"tensor 'w': 2 of 4 values .* do not fit the stored {np.dtype(dtype)}"):
        checkpoint.save(tmp_path / "out", params, like=target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_infinity_and_nan_are_kept_where_the_dtype_has_them():
    leaf = np.array([np.inf, -np.inf, np.nan, 0.0], np.float32)
    np.testing.assert_array_equal(round_to_stored("x", leaf, ml_dtypes.bfloat16).astype(np.float32), leaf)
    with pytest.raises(CheckpointError, match="2 of 4"):
        round_to_stored("x", leaf, ml_dtypes.float8_e4m3fn)  # has no infinity


def test_integers_must_fit_and_kinds_never_mix(tmp_path):
    assert round_to_stored("x", np.array([1, -2], np.int32), np.int64).dtype == np.int64
    with pytest.raises(CheckpointError, match=r"1 of 2 values of int32.*do not fit the stored int8, the first is 300"):
        round_to_stored("x", np.array([1, 300], np.int32), np.int8)
    with pytest.raises(CheckpointError, match="1 of 1"):
        round_to_stored("x", np.array(-1, np.int64), np.uint64)
    for leaf, dtype in [(np.ones(4), np.int32), (np.ones(4, np.int32), np.float32), (np.ones(4, bool), np.int32)]:
        target = store(tmp_path / f"{leaf.dtype}{np.dtype(dtype)}", dtype)
        with pytest.raises(CheckpointError, match=f"tensor 'w': stored as {np.dtype(dtype)}, got {leaf.dtype}"):
            checkpoint.save(tmp_path / "out", {"w": leaf}, like=target)


@pytest.mark.parametrize("wide", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "narrow", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_rounding_is_to_the_nearest_with_ties_to_even(wide, narrow):
    """Against exact arithmetic on every neighbour: ties, and values a hair beside them, which two roundings miss."""
    dtype = np.dtype(getattr(ml_dtypes, narrow, narrow))
    bits = np.arange(2 ** (8 * dtype.itemsize - 1), dtype=np.uint64).astype(f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # among all patterns are signalling NaNs
        grid = bits.view(dtype).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    random = np.random.RandomState(0)
    starts = np.unique(np.r_[0, 1, 2, random.randint(0, len(grid) - 1, 200)])
    for low, high in zip(grid[starts], grid[starts + 1], strict=True):
        middle = (low + high) / 2
        hair = max(abs(middle), 2.0**-126) * (2.0**-45 if wide == np.float64 else 2.0**-22)
        for value in wide([middle, middle + hair, middle - hair, low, high]):
            to_low, to_high = Fraction(float(value)) - Fraction(low), Fraction(high) - Fraction(float(value))
            even = low if not int(np.array(low).astype(dtype).view(bits.dtype)) & 1 else high
            expected = even if to_low == to_high else low if to_low < to_high else high
            for sign in (1, -1):
                found = float(round_to_stored("x", np.array([sign * value], wide), dtype)[0])
                assert found == sign * expected, (low, value, high)


def test_names_and_shapes_are_those_of_the_target(tmp_path):
    target = store(tmp_path / "t", np.float32)
    for params, message in [
        ({"v": np.ones(4, np.float32)}, "v: only in the result\n  w: only in the layout"),
        ({"w": np.ones(5, np.float32)}, r"w: result float32\[5\], layout float32\[4\]"),
        ({f"v{n}": np.ones(4) for n in range(20)}, "and 9 more"),
    ]:
        with pytest.raises(TreeMismatchError, match=message):
            checkpoint.save(tmp_path / "out", params, like=target)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="like brings its own config and format"):
        checkpoint.save(tmp_path / "out", target.params, like=target, config={})


def test_formats_say_what_they_cannot_hold(tmp_path):
    for format, leaf, message in [
        ("npz", np.ones(2, ml_dtypes.bfloat16), "npz cannot hold bfloat16"),
        ("orbax", np.ones((0, 2), np.float32), "orbax cannot hold an empty array"),
        ("orbax", np.array(["a"]), "is not read back"),
        ("folder", np.ones(2, np.complex128), "has no dtype complex128"),
    ]:
        with pytest.raises(CheckpointError, match=f"tensor 'a/b': .*{message}"):
            checkpoint.save(tmp_path / "out", {"a": {"b": leaf}}, config=CONFIG, format=format)
    with pytest.raises(CheckpointError, match=r"cannot be called 'config\.json'"):
        checkpoint.save(tmp_path / "out", {"config.json": np.ones(2)}, config=CONFIG, format="npz")


def test_empty_leaves_and_big_endian_arrays_are_stored(tmp_path):
    params = {"empty": np.ones((0, 2), np.float32), "big": np.array([1.5, 2.5], ">f4")}
    found = checkpoint.load(checkpoint.save(tmp_path / "out", params, config=CONFIG)).params
    assert found["empty"].shape == (0, 2)
    np.testing.assert_array_equal(found["big"], np.array([1.5, 2.5], np.float32))


def test_leaves_are_taken_one_at_a_time(tmp_path):
    """The host never holds the whole result: each leaf is made when its turn to be written comes."""

    class Lazy:
        dtype, shape, alive, most = np.dtype(np.float32), (1000,), 0, 0

        def __array__(self, dtype=None, copy=None):
            return np.ones(1000, np.float32).view(Counted)

    class Counted(np.ndarray):
        def __array_finalize__(self, other):
            Lazy.alive += 1
            Lazy.most = max(Lazy.most, Lazy.alive)

        def __del__(self):
            Lazy.alive -= 1

    checkpoint.save(tmp_path / "out", {f"w{n}": Lazy() for n in range(50)}, config={})
    assert 0 < Lazy.most < 10


def test_extra_files_lie_beside_and_never_over(tmp_path):
    extra = {"report.json": '{"ä": 1}', "plots/a.png": b"\0"}
    out = checkpoint.save(tmp_path / "out", PARAMS, config=CONFIG, extra_files=extra)
    assert json.loads((out / "report.json").read_text()) == {"ä": 1}
    assert (out / "plots" / "a.png").read_bytes() == b"\0"
    for name in ("../x", "/x", "a/../../x", "", ".."):
        with pytest.raises(OutputError, match="not a name inside the output"):
            checkpoint.save(tmp_path / "b", PARAMS, config=CONFIG, extra_files={name: b""})
    with pytest.raises(OutputError, match=r"'config\.json': the checkpoint has a file of this name"):
        checkpoint.save(tmp_path / "b", PARAMS, config=CONFIG, extra_files={"config.json": b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_input_is_never_its_own_output(tmp_path):
    checkpoint.save(tmp_path / "in", PARAMS, config=CONFIG)
    before = (tmp_path / "in" / "model.safetensors").read_bytes()
    target = checkpoint.load(tmp_path / "in")
    changed = map_leaves(lambda _, leaf: leaf, target.params)
    for place in ("in", "in/below", "."):
        with pytest.raises(OutputError, match="overlaps the input"):
            checkpoint.save(tmp_path / place, changed, like=target, overwrite=True)
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == before


def test_a_single_file_becomes_a_folder_with_a_file_of_its_name(tmp_path):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "vit.safetensors")
    target = checkpoint.load(tmp_path / "vit.safetensors", config=CONFIG)
    out = checkpoint.save(tmp_path / "out", {"w": np.zeros(2, np.float32)}, like=target)
    assert (out / "vit.safetensors").exists()
    np.testing.assert_array_equal(checkpoint.load(out, config=CONFIG).params["w"], np.zeros(2))


def test_a_side_file_that_vanished_is_named(tmp_path):
    checkpoint.save(tmp_path / "in", PARAMS, config=CONFIG)
    (tmp_path / "in" / "vocab.txt").write_text("a")
    target = checkpoint.load(tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.txt: cannot be read: No such file"):
        checkpoint.save(tmp_path / "out", target.params, like=target)
    assert not (tmp_path / "out").exists()
