"""Leaves that are made when read: the same results bit for bit, little memory, and the files' pages given back."""

import jax
import numpy as np
import pytest
from small_models import random_params

import jaxtune as jt
from jaxtune import symmetry, tree
from jaxtune.align import products
from jaxtune.evaluate.example import apply_to_matrix, example_batch
from jaxtune.lazy import LazyLeaf, ReadOnUse, defer, is_lazy
from jaxtune.loading import load
from jaxtune.models import decoder, registry, vit
from jaxtune.models.keys import KeyTable, Row
from jaxtune.tree import flatten

VIT = vit.Config(
    image_size=8, patch_size=4, width=16, depth=2, num_heads=2, mlp_width=24, num_outputs=5, channels=1
)  # fmt: skip


def resident(kind):
    """Bytes of this process in memory, "RssAnon" its own or "RssFile" pages of files."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(kind))


@pytest.fixture
def folders(tmp_path):
    """Old base, fine-tune, and a new base that is the old one moved, with noise."""
    spec, old = registry.symmetry_of(VIT), random_params(VIT, dtype=np.float32)
    draw = np.random.default_rng(0)
    tuned = tree.map_leaves(lambda _, x: x + np.float32(0.01) * draw.standard_normal(x.shape, np.float32), old)
    new = symmetry.apply(spec, symmetry.random(jax.random.key(5), spec), old)
    new = tree.map_leaves(lambda _, x: x + np.float32(0.01) * draw.standard_normal(x.shape, np.float32), new)
    for name, params in (("old", old), ("tuned", tuned), ("new", new)):
        jt.save(tmp_path / name, params, config=registry.config_to_dict(VIT))
    return [tmp_path / name for name in ("old", "tuned", "new")]


def test_a_lazy_leaf_is_an_array_to_whoever_reads_it():
    calls = []
    leaf = LazyLeaf((2, 3), np.float32, lambda: calls.append(0) or np.ones((2, 3), np.float32))
    assert (leaf.ndim, leaf.size, leaf.nbytes, str(leaf)) == (2, 6, 24, "LazyLeaf(float32[2, 3])")
    half = leaf.astype(np.float16)
    assert not calls
    assert np.asarray(half).dtype == np.float16
    assert np.asarray(leaf, np.float64).dtype == np.float64
    assert len(calls) == 2


def test_a_leaf_that_is_made_wrong_is_noticed():
    with pytest.raises(AssertionError, match=r"float32\[2\] became float64\[3\]"):
        LazyLeaf((2,), np.float32, lambda: np.ones(3)).read()


def test_trees_of_lazy_leaves_map_to_trees_of_lazy_leaves():
    base = {"a": np.arange(4, dtype=np.float16), "n": np.arange(3)}
    deferred = tree.map_leaves(lambda _, leaf: defer(leaf), base)
    vector = tree.task_vector(deferred, tree.map_leaves(lambda _, leaf: leaf + np.ones((), leaf.dtype), base))
    assert all(is_lazy(leaf) for leaf in flatten(vector).values())
    assert vector["a"].dtype == np.float32
    moved = tree.apply_task_vector(deferred, vector, 2.0)
    assert moved["a"].dtype == np.float16
    np.testing.assert_array_equal(np.asarray(moved["a"]), base["a"] + 2)
    np.testing.assert_array_equal(np.asarray(moved["n"]), base["n"])
    assert isinstance(ReadOnUse(deferred)["a"], np.ndarray)


@pytest.mark.parametrize("method", ["identity", "orthogonal_shift", "permutation", "full", "auto"])
def test_a_transport_of_lazy_checkpoints_is_the_same_bit_for_bit(method, folders):
    whole, lazy = ([load(folder, lazy=is_lazy) for folder in folders] for is_lazy in (False, True))
    assert all(is_lazy(leaf) for leaf in flatten(lazy[0].params).values())
    expected, found = jt.transport(*whole, method=method), jt.transport(*lazy, method=method)
    assert found.prepared.info == expected.prepared.info
    for path, leaf in flatten(expected.params).items():
        np.testing.assert_array_equal(np.asarray(flatten(found.params)[path]), leaf, err_msg=path)
    assert found.evidence.as_dict() == expected.evidence.as_dict()


def test_what_is_lazy_is_written_as_what_is_not(folders, tmp_path):
    lazy = [load(folder, lazy=True) for folder in folders]
    jt.save(tmp_path / "lazy", jt.transport(*lazy, method="permutation").params, like=lazy[2])
    whole = [load(folder) for folder in folders]
    jt.save(tmp_path / "whole", jt.transport(*whole, method="permutation").params, like=whole[2])
    assert (tmp_path / "lazy/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_nan_in_a_lazy_checkpoint_is_refused(folders):
    lazy = [load(folder, lazy=True) for folder in folders]
    spoiled = dict(lazy[1].params) | {"position": np.full_like(np.asarray(lazy[1].params["position"]), np.nan)}
    with pytest.raises(jt.errors.NonFiniteError, match="position"):
        jt.transport(lazy[0].params, spoiled, lazy[2].params, config=VIT)


def test_a_decoder_runs_part_by_part():
    config = decoder.Config(vocab_size=50, width=16, depth=2, num_heads=2, num_kv_heads=2, head_width=8, mlp_width=24)
    params = jax.tree.map(np.asarray, registry.init(jax.random.key(0), config))
    batch = example_batch(jax.random.key(1), config, 3)
    lazy = tree.map_leaves(lambda _, leaf: defer(leaf), params)
    ours, theirs = (np.asarray(apply_to_matrix(config, p, batch)) for p in (lazy, params))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_are_read_lazily_one_leaf_at_a_time():
    rows = (
        Row("qkv", ("q", "k"), "(h u) d -> d h u", {"h": 2}, sizes=(4, 4)),
        Row(("e0", "e1"), "experts", "a b -> b a"),
    )
    draw = np.random.default_rng(0)
    tensors = {"qkv": draw.normal(size=(8, 3)), "e0": draw.normal(size=(2, 3)), "e1": draw.normal(size=(2, 3))}
    table = KeyTable(rows)
    whole, lazy = table.decode(tensors), table.decode(tensors, lazy=True)
    assert {path: leaf.shape for path, leaf in lazy.items()} == {path: leaf.shape for path, leaf in whole.items()}
    for path in whole:
        np.testing.assert_array_equal(np.asarray(lazy[path]), whole[path])
    again = table.encoder(lazy, {})
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again(name), tensor)


def test_a_large_leaf_is_scored_part_by_part_the_same(monkeypatch):
    config = decoder.Config(vocab_size=50, width=16, depth=1, num_heads=2, num_kv_heads=2, head_width=8, mlp_width=24)
    spec = registry.symmetry_of(config)
    element = symmetry.random(jax.random.key(0), spec)
    ours, theirs = (flatten(random_params(config, seed=seed, dtype=np.float32)) for seed in (0, 1))
    for path, axis in (("embed/token", 1), ("head/kernel", 0), ("block_0/mlp/up/kernel", 0)):
        pair = spec, element, path, axis, ours[path], theirs[path]
        whole = np.asarray(products.add_unit_scores(None, 2.0, *pair))
        with monkeypatch.context() as patch:
            patch.setattr(products, "PART_BYTES", 7 * 16 * 4)
            parts = np.asarray(products.add_unit_scores(None, 2.0, *pair))
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(parts, 2.0 * np.asarray(products.unit_scores(*pair)), rtol=1e-5, atol=1e-5)


def test_reading_a_file_leaf_by_leaf_leaves_nothing_in_memory(tmp_path):
    params = {f"leaf_{n}": np.full((1 << 20,), n, np.float32) for n in range(32)}  # 128 MiB
    jt.save(tmp_path / "model", params, config={"model_type": "unknown"})
    del params
    model = load(tmp_path / "model", lazy=True)
    before = resident("RssFile"), resident("RssAnon")
    total = sum(float(np.asarray(leaf).mean()) for leaf in flatten(model.params).values())
    assert total == sum(range(32))
    assert resident("RssFile") - before[0] < 24 << 20
    assert resident("RssAnon") - before[1] < 24 << 20
