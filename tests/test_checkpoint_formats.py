"""Every format is recognised, loaded and written again; nothing a stranger wrote leads anywhere else."""

import hashlib
import io
import json
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors as reference
from safetensors.numpy import save_file

from jaxtune.checkpoint import load, save
from jaxtune.checkpoint.npz import read_archive
from jaxtune.errors import CheckpointError
from jaxtune.tree import flatten

CONFIG = {"model_type": "jaxtune_vit", "depth": 2}
CONFIG_TEXT = '{"depth": 2,\n\t"model_type" : "jaxtune_vit"}'  # not as json.dumps writes it
TENSORS = {
    "block_0/attn/q/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "block_0/attn/q/bias": np.array([1, -2, 0.5, 4], np.float16),
    "block_10/scale": np.array(2.5, np.float32),
    "block_2/mask": np.array([True, False, True]),
    "step": np.array([7], np.int64),
}
INDEX = "model.safetensors.index.json"


def write_config(folder):
    (folder / "config.json").write_text(CONFIG_TEXT)


def write_shards(folder, *, weight_map=None):
    """Two shards by the reference library and their index, in a layout of its own."""
    names = sorted(TENSORS)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for shard, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, folder / shard, {"format": "pt"})
    weight_map = weight_map or {name: shard for shard, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 70}, "weight_map": weight_map}, indent=1))


def make_folder(root):
    write_config(root)
    save_file(TENSORS, root / "model.safetensors", {"format": "pt"})
    return root


def make_sharded_folder(root):
    write_config(root)
    write_shards(root)
    return root


def make_safetensors_with_config_inside(root):
    save_file(TENSORS, root / "vit.safetensors", {"jaxtune_config": CONFIG_TEXT, "z": "1"})
    return root / "vit.safetensors"


def make_safetensors_with_config_beside(root):
    write_config(root)
    save_file(TENSORS, root / "vit.safetensors")
    return root / "vit.safetensors"


def make_safetensors_folder_of_another_name(root):
    write_config(root)
    save_file(TENSORS, root / "weights.safetensors")
    return root


def make_npz(root):
    np.savez(root / "vit.npz", **TENSORS, **{"config.json": np.array(CONFIG_TEXT)})
    return root / "vit.npz"


def make_compressed_npz(root):
    np.savez_compressed(root / "vit.npz", **{"config.json": np.array(CONFIG_TEXT.encode())}, **TENSORS)
    return root / "vit.npz"


def make_npz_with_config_beside(root):
    write_config(root)
    fortran = {name: np.asfortranarray(array) if array.ndim > 1 else array for name, array in TENSORS.items()}
    np.savez(root / "vit.npz", **fortran)
    return root / "vit.npz"


def make_npz_folder(root):
    write_config(root)
    np.savez(root / "any name.npz", **TENSORS)
    return root


def make_orbax_folder(root):
    write_config(root)
    save_orbax(root / "params")
    return root


def make_orbax(root):
    save_orbax(root / "step_3")
    write_config(root)
    return root / "step_3"


def save_orbax(path, tree=None):
    from orbax.checkpoint import v1 as ocp

    nested = {
        "block_0": {"attn": {"q": {k: TENSORS[f"block_0/attn/q/{k}"] for k in ("kernel", "bias")}}},
        "block_10": {"scale": TENSORS["block_10/scale"]},
        "block_2": {"mask": TENSORS["block_2/mask"]},
        "step": TENSORS["step"],
    }
    ocp.save(path, nested if tree is None else tree)


DETERMINISTIC = [
    make_folder,
    make_sharded_folder,
    make_safetensors_with_config_inside,
    make_safetensors_with_config_beside,
    make_safetensors_folder_of_another_name,
    make_npz,
    make_compressed_npz,
    make_npz_with_config_beside,
    make_npz_folder,
]
ALL = [*DETERMINISTIC, make_orbax_folder, make_orbax]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def assert_same_tensors(params, expected=TENSORS):
    flat = flatten(params)
    assert flat.keys() == expected.keys()
    for name, array in flat.items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == expected[name].dtype
        assert array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes()


def file_bytes(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_every_format_is_recognised(root, make):
    path = make(root)
    checkpoint = load(path)
    assert_same_tensors(checkpoint.params)
    assert checkpoint.config == CONFIG
    assert checkpoint.path == path
    expected = next(kind for kind in ("npz", "orbax", "folder", "safetensors") if kind in make.__name__)
    assert checkpoint.format == ("folder" if make is make_safetensors_folder_of_another_name else expected)
    assert {name: info.dtype for name, info in checkpoint.layout.tensors.items()} == {
        name: array.dtype for name, array in TENSORS.items()
    }
    assert checkpoint.layout.num_bytes == sum(array.nbytes for array in TENSORS.values())


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_a_checkpoint_written_like_itself_is_itself(root, tmp_path, make):
    checkpoint = load(make(root))
    out = save(tmp_path / "out", checkpoint.params, like=checkpoint)
    again = load(out)
    assert_same_tensors(again.params)
    assert again.config == CONFIG
    assert again.layout.config == checkpoint.layout.config


@pytest.mark.parametrize("make", DETERMINISTIC, ids=lambda make: make.__name__)
def test_its_files_are_the_same_bytes_and_no_others(root, tmp_path, make):
    checkpoint = load(make(root))
    written = file_bytes(save(tmp_path / "out", checkpoint.params, like=checkpoint))
    assert "manifest.json" in written
    del written["manifest.json"]
    assert written == file_bytes(root)


def test_metadata_is_read(root):
    assert load(make_safetensors_with_config_inside(root)).metadata == {"jaxtune_config": CONFIG_TEXT, "z": "1"}


def test_names_of_other_families_stay_whole(root, tmp_path):
    names = {"model.layers.0.q_proj.weight": np.ones((2, 2), np.float32), "lm_head.weight": np.ones(2, np.float32)}
    save_file(names, root / "model.safetensors")
    (root / "config.json").write_text('{"model_type": "llama", "limit": [0.0, Infinity]}')
    checkpoint = load(root)
    assert checkpoint.params.keys() == names.keys()
    assert checkpoint.config["limit"] == [0.0, float("inf")]  # Hugging Face writes such configs
    assert load(save(tmp_path / "out", checkpoint.params, like=checkpoint)).params.keys() == names.keys()


def test_jax_arrays_saved_by_orbax_come_back_as_numpy(root):
    import jax.numpy as jnp

    save_orbax(root / "step", {"a": {"b": jnp.ones((2, 3), jnp.bfloat16)}})
    params = load(root / "step", config=CONFIG).params
    assert_same_tensors(params, {"a/b": np.ones((2, 3), ml_dtypes.bfloat16)})


# --- configs


def test_a_config_may_be_given_where_there_is_none(root):
    save_file(TENSORS, root / "a.safetensors")
    assert load(root / "a.safetensors", config=CONFIG).config == CONFIG
    assert load(root / "a.safetensors", config={}).config == {}
    with pytest.raises(CheckpointError, match=r"no config.*config\.json beside the weights, or pass config="):
        load(root / "a.safetensors")


def test_a_config_that_contradicts_is_refused(root):
    make_folder(root)
    assert load(root, config=CONFIG).config == CONFIG
    with pytest.raises(
        CheckpointError, match=r"two configs that differ in depth, width.*config\.json and the argument"
    ):
        load(root, config={"model_type": "jaxtune_vit", "depth": 3, "width": 1})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "\ufeff{}", "1" * 5000])
def test_a_damaged_config_is_refused_by_name(root, text):
    make_folder(root)
    (root / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object"):
        load(root)


@pytest.mark.parametrize("array", [np.array(["{}"]), np.array(3), np.array(b"\xff"), np.array("[1]")], ids=str)
def test_a_damaged_config_inside_an_npz_is_refused(root, array):
    np.savez(root / "a.npz", x=np.ones(2), **{"config.json": array})
    with pytest.raises(CheckpointError, match=r"a\.npz: entry 'config\.json'"):
        load(root / "a.npz")


# --- nothing recognised


def test_what_is_missing_or_unknown_says_what_was_found_and_what_is_expected(root):
    with pytest.raises(
        CheckpointError, match=r"nowhere: no such file or folder\. Expected one of: a folder with config"
    ):
        load(root / "nowhere")
    with pytest.raises(CheckpointError, match=r"The folder is empty\. Expected one of"):
        load(root)
    (root / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"nothing recognised\. Found: 'notes\.txt'\. Expected one of"):
        load(root)
    with pytest.raises(CheckpointError, match=r"notes\.txt: a file that ends in neither"):
        load(root / "notes.txt")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt"])
def test_pickles_of_something_else_are_refused_with_the_way_out(root, name):
    (root / name).write_bytes(b"\x80\x04]\x94.")
    for path in (root, root / name):
        with pytest.raises(CheckpointError, match=f"{name}: a pickle that torch did not write.*Convert others to safe"):
            load(path, config={})


def test_a_folder_of_orbax_steps_names_them(root):
    save_orbax(root / "100", {"a": np.ones(2)})
    save_orbax(root / "200", {"a": np.ones(2)})
    with pytest.raises(CheckpointError, match="orbax checkpoints in it: Found: '100', '200'"):
        load(root)


def test_several_weights_without_an_index_are_ambiguous(root):
    write_shards(root)
    (root / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"2 \.safetensors but no model\.safetensors\.index\.json"):
        load(root, config=CONFIG)


def test_a_checkpoint_of_nothing_is_refused(root):
    save_file({}, root / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensor"):
        load(root / "a.safetensors", config=CONFIG)


@pytest.mark.parametrize("name", ["", "a//b", "/a", "a/", "a\x1b[2J", "/".join("a" * 65)])
def test_names_that_are_no_paths_are_refused(root, name):
    save_file({name: np.ones(2)}, root / "a.safetensors")
    with pytest.raises(CheckpointError, match="expected printable words joined by '/'") as caught:
        load(root / "a.safetensors", config=CONFIG)
    assert "\x1b" not in str(caught.value)  # a terminal must not obey it


def test_a_name_that_runs_through_another_is_refused(root):
    save_file({"a": np.ones(2), "a/b": np.ones(2)}, root / "a.safetensors")
    with pytest.raises(CheckpointError, match="do not form a tree"):
        load(root / "a.safetensors", config=CONFIG)


# --- shards


def damage_index(root, change):
    index = json.loads((root / INDEX).read_text())
    change(index["weight_map"])
    (root / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors"])
def test_an_index_leads_nowhere_else(root, shard):
    make_sharded_folder(root)
    save_file({"stolen": np.ones(2)}, root.parent / "x.safetensors")
    damage_index(root, lambda weights: weights.update(stolen=shard))
    with pytest.raises(CheckpointError, match="not the plain name of a file in this folder"):
        load(root)


@pytest.mark.parametrize("shard", [3, None, ["a"], "config.json", ""])
def test_an_index_names_safetensors(root, shard):
    make_sharded_folder(root)
    damage_index(root, lambda weights: weights.update(step=shard))
    with pytest.raises(CheckpointError, match=r"tensor 'step': expected a \.safetensors of this folder"):
        load(root)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a":"b"'])
def test_a_damaged_index_is_refused(root, text):
    make_sharded_folder(root)
    (root / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: expected"):
        load(root)


def test_index_and_shards_tell_the_same_story(root):
    make_sharded_folder(root)
    good = (root / INDEX).read_text()
    damage_index(root, lambda weights: weights.pop("step"))
    with pytest.raises(CheckpointError, match=r"holds tensor 'step', but .* does not name it"):
        load(root)
    (root / INDEX).write_text(good)
    damage_index(root, lambda weights: weights.update(more="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: tensor 'more' is missing"):
        load(root)
    (root / INDEX).write_text(good)
    damage_index(root, lambda weights: weights.update(step="model-00001-of-00002.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"00002-of-00002\.safetensors: holds tensor 'step', but .* says 'model-00001"
    ):
        load(root)
    (root / INDEX).write_text(good)
    first = sorted(TENSORS)[0]
    save_file({first: TENSORS[first], "step": TENSORS["step"]}, root / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=rf"00002-of-00002\.safetensors: tensor '{first}' is also in model-00001"):
        load(root)
    (root / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors: named by .* but missing"):
        load(root)


def test_a_whole_file_beside_shards_is_ambiguous(root):
    make_sharded_folder(root)
    save_file(TENSORS, root / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and model\.safetensors\.index\.json"):
        load(root)


# --- links


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json", INDEX])
def test_a_link_that_leaves_the_folder_is_refused(root, name):
    make_sharded_folder(root)
    (root / name).rename(root.parent / "outside")
    (root / name).symlink_to("../outside")
    with pytest.raises(CheckpointError, match="a symbolic link that leaves the folder"):
        load(root)


def test_a_link_inside_the_folder_is_followed(root):
    make_folder(root)
    (root / "blob").mkdir()
    (root / "model.safetensors").rename(root / "blob" / "abc")
    (root / "model.safetensors").symlink_to("blob/abc")
    assert_same_tensors(load(root).params)


def test_the_cache_of_the_hub_is_one_folder(root):
    snapshot = root / "models--x" / "snapshots" / "1234"
    blobs = root / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    make_folder(snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (snapshot / name).rename(blobs / f"{name}-hash")
        (snapshot / name).symlink_to(f"../../blobs/{name}-hash")
    checkpoint = load(snapshot)
    assert_same_tensors(checkpoint.params)
    assert list(checkpoint.side_files) == ["tokenizer.json"]
    assert_same_tensors(load(snapshot / "model.safetensors").params)
    # The same picture with blobs itself a link is an attack: it would open any folder.
    blobs.rename(root.parent / "secrets")
    blobs.symlink_to("../../secrets")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        load(snapshot)


def test_links_inside_orbax_stay_inside(root):
    make_orbax_folder(root)
    (root.parent / "secret").write_text("x")
    (root / "params" / "more").symlink_to("../../secret")
    with pytest.raises(CheckpointError, match="more: a symbolic link that leaves the checkpoint"):
        load(root)
    (root / "params" / "more").unlink()
    (root / "params").rename(root.parent / "params")
    (root / "params").symlink_to("../params")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        load(root)


# --- side files


def test_every_other_file_is_carried_and_the_rest_has_a_reason(root, tmp_path):
    make_folder(root)
    (root / "tokenizer.model").write_bytes(b"\0\1")
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_text("{}")
    (root / "empty").write_bytes(b"")
    carried = {"tokenizer.model", "1_Pooling/config.json", "empty"}
    for name in ("pytorch_model.bin", "flax_model.msgpack", "other.safetensors", "report.json", "manifest.json"):
        (root / name).write_bytes(b"old")
    save_orbax(root / "flax")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("x")
    os.mkfifo(root / "pipe")
    (root.parent / "secret").write_text("x")
    (root / "vocab.txt").symlink_to("../secret")
    (root / "folder").symlink_to("..")
    (root / "merges.txt").symlink_to("tokenizer.model")
    carried.add("merges.txt")
    checkpoint = load(root)
    assert checkpoint.side_files.keys() == carried
    assert checkpoint.left_out == {
        "pytorch_model.bin": "weights that are not part of this checkpoint",
        "flax_model.msgpack": "weights that are not part of this checkpoint",
        "other.safetensors": "weights that are not part of this checkpoint",
        "report.json": "describes the checkpoint it lies beside",
        "manifest.json": "describes the checkpoint it lies beside",
        "flax/": "weights in another format",
        ".git/": "a hidden folder",
        "pipe": "not a regular file",
        "vocab.txt": "a link that leaves the folder",
        "folder/": "a link to a folder",
    }
    out = save(tmp_path / "out", checkpoint.params, like=checkpoint)
    written = file_bytes(out)
    assert written.keys() == carried | {"config.json", "model.safetensors", "manifest.json"}
    assert all(written[name] == (root / name).read_bytes() for name in carried)
    assert not any(path.is_symlink() for path in out.rglob("*"))


# --- .npz


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_header(text):
    raw = text.encode()
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw


class Bomb:
    """Unpickled, it would call `os.abort`."""

    def __reduce__(self):
        return os.abort, ()


NPZ = {
    "not_a_zip": (b"PK not a zip", "expected a .npz archive"),
    "not_an_array": ([("x.npy", b"nothing")], "expected a .npz archive"),
    "other_file": ([("readme.txt", b"hello")], "only arrays, whose names end with .npy"),
    "twice": ([("x.npy", npy(np.ones(2)))] * 2, "one entry of this name, found two"),
    "pickle": ([("x.npy", npy(np.array([Bomb()]), allow_pickle=True))], "Python objects, which are pickled"),
    "text": ([("x.npy", npy(np.array(["a"])))], "a dtype among"),
    "structured": ([("x.npy", npy(np.zeros(2, [("a", "f4")])))], "a dtype among"),
    "bfloat16": ([("x.npy", npy(np.ones(2, ml_dtypes.bfloat16)))], "bfloat16 and float8 lose their name"),
    "truncated": ([("x.npy", npy(np.ones(9))[:-1])], "72 bytes for float64\\[9\\], found 71"),
    "trailing": ([("x.npy", npy(np.ones(9)) + b"!")], "72 bytes for float64\\[9\\], found 73"),
    "huge": (
        [("x.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"))],
        "4000000000000 bytes",
    ),
    "negative": (
        [("x.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }\n") + b"1234")],
        "entry 'x'",
    ),
    "deep_header": ([("x.npy", npy_header("{'descr': " + "[" * 3000 + "}\n"))], "expected a .npz archive"),
    "bool": ([("x.npy", npy(np.array([True, True]))[:-1] + b"\2")], "boolean bytes"),
}


@pytest.mark.parametrize("name", NPZ)
def test_a_hostile_npz_is_refused_by_name(root, name):
    content, message = NPZ[name]
    path = root / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name == "twice":
        with pytest.warns(UserWarning, match="Duplicate"):
            write_zip(path, content)
    else:
        write_zip(path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path, config=CONFIG)
    assert str(path) in str(caught.value)


def test_big_endian_arrays_keep_their_values(root):
    np.savez(root / "a.npz", x=np.array([1.5, 2.0], ">f4"))
    assert_same_tensors(load(root / "a.npz", config=CONFIG).params, {"x": np.array([1.5, 2.0], np.float32)})


def test_empty_arrays_and_scalars_live_in_an_npz(root):
    arrays = {"x": np.zeros((0, 3), np.float32), "y": np.array(3, np.int8)}
    np.savez(root / "a.npz", **arrays)
    assert_same_tensors(read_archive(root / "a.npz")[1], arrays)


def test_one_corrupt_byte_of_an_npz_never_surprises(root):
    """200 single-byte corruptions: refused, or the same data (a checksum covers it) under a changed name or label."""
    np.savez(root / "good.npz", **TENSORS)
    good = (root / "good.npz").read_bytes()
    random = np.random.RandomState(0)
    num_refused = 0
    for _ in range(200):
        bad = bytearray(good)
        bad[random.randint(len(bad))] ^= 1 << random.randint(8)
        (root / "bad.npz").write_bytes(bad)
        try:
            params = load(root / "bad.npz", config=CONFIG).params
        except CheckpointError:
            num_refused += 1
            continue
        found = {hashlib.sha256(array.tobytes()).digest() for array in flatten(params).values()}
        assert found <= {hashlib.sha256(array.tobytes()).digest() for array in TENSORS.values()}
    assert num_refused > 100


# --- orbax


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [np.ones(2)]}, "found list at 'a'"),
        ({"a": 3}, "found int at 'a'"),
        ({"a": None}, "found NoneType at 'a'"),
        ({"a/b": np.ones(2)}, "keys that are non-empty strings without '/'"),
    ],
    ids=str,
)
def test_only_nested_dicts_of_arrays_are_read_from_orbax(root, tree, message):
    save_orbax(root / "a", tree)
    with pytest.raises(CheckpointError, match=message):
        load(root / "a", config=CONFIG)


def test_a_damaged_orbax_folder_is_refused_by_name(root):
    make_orbax_folder(root)
    (root / "params" / "state" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="params: expected"):
        load(root)


def test_the_reference_library_agrees_on_what_was_written(root, tmp_path):
    checkpoint = load(make_sharded_folder(root))
    out = save(tmp_path / "out", checkpoint.params, like=checkpoint)
    for shard in sorted(out.glob("*.safetensors")):
        for name, found in reference.deserialize(shard.read_bytes()):
            assert bytes(found["data"]) == TENSORS[name].tobytes()
