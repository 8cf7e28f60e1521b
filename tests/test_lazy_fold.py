"""Folding leaf by leaf: of lazy checkpoints the same bits as of whole ones, with nothing read that is not needed."""

import numpy as np
import pytest
from hub_models import MODELS, make_model, write_folder

from jaxtune import tree
from jaxtune.errors import SpecError
from jaxtune.lazy import LazyLeaf, is_lazy
from jaxtune.loading import load, network_of
from jaxtune.models import registry
from jaxtune.symmetry import canonical, folding
from jaxtune.tree import flatten

pytest.importorskip("transformers")


@pytest.fixture
def small_parts(monkeypatch):
    """Leaves of the tests are cut as large ones are."""
    monkeypatch.setattr(folding, "PART_VALUES", 1 << 10)


def assert_same_bits(lazy, whole):
    lazy, whole = flatten(lazy), flatten(whole)
    assert lazy.keys() == whole.keys()
    for path, leaf in whole.items():
        assert is_lazy(lazy[path]), path
        assert (lazy[path].shape, lazy[path].dtype) == (leaf.shape, leaf.dtype), path
        np.testing.assert_array_equal(lazy[path].read(), leaf, err_msg=path)


def spoil(params, path):
    """Makes a gain zero and another nearly zero, in place."""
    *parents, name = path.split("/")
    for parent in parents:
        params = params[parent]
    gain = np.array(params[name])
    gain[3], gain[5] = 0, 1e-4
    params[name] = LazyLeaf(gain.shape, gain.dtype, gain.copy) if is_lazy(params[name]) else gain


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", MODELS)
def test_lazy_leaves_fold_and_unfold_to_the_same_bits(name, tmp_path):
    folders = [write_folder(tmp_path / str(seed), make_model(name, seed=seed)) for seed in range(3)]
    stored = load(folders[0])
    spec = registry.symmetry_of(network_of(stored))
    if spec.form is None:
        with pytest.raises(SpecError, match="no canonical form"):
            canonical.fold(spec, load(folders[0], lazy=True).params)
        return
    whole, lazy = ([load(folder, lazy=lazy).params for folder in folders] for lazy in (False, True))
    first = spec.form.norms[0]
    if not first.keeps_offset and not first.counts_from_one:  # rows that the base cannot take are counted in parts too
        for _, _, base in (whole, lazy):
            spoil(base, first.scale)
    for dtype in (np.float32, np.float64):
        moved = []
        for source, tuned, base in (whole, lazy):
            folded = [canonical.fold(spec, params, dtype=dtype) for params in (source, tuned)]
            change = tree.task_vector(*folded)
            moved.append((folded[0], change, canonical.unfold(spec, change, base, dtype=dtype)))
        for of_whole, of_lazy in zip(*moved, strict=True):
            if isinstance(of_whole, canonical.Unfolded):
                assert of_lazy.lost == of_whole.lost
                of_whole, of_lazy = of_whole.task_vector, of_lazy.task_vector
            assert_same_bits(of_lazy, of_whole)
        if canonical.can_realise(spec.form):
            again, expected = (canonical.realise(spec, found[0], stored.params) for found in reversed(moved))
            for path, leaf in flatten(expected).items():
                np.testing.assert_array_equal(np.asarray(flatten(again)[path]), leaf, err_msg=path)


@pytest.mark.parametrize(
    ("name", "path", "needed"),
    [
        ("llama", "block_1/attn/v/kernel", {"block_1/attn/v/kernel", "block_1/norm1/scale"}),
        ("llama", "block_1/attn/out/kernel", {"block_1/attn/out/kernel"}),
        ("gpt2", "head/kernel", {"embed/token", "final_norm/scale"}),
        ("gpt2", "block_0/mlp/up/bias", {"block_0/mlp/up/bias", "block_0/mlp/up/kernel", "block_0/norm2/bias"}),
    ],
)
def test_a_folded_leaf_reads_what_lies_in_it_and_nothing_else(name, path, needed, tmp_path):
    stored, reads = load(write_folder(tmp_path / name, make_model(name))), []

    def watch(path, leaf):
        return LazyLeaf(leaf.shape, leaf.dtype, lambda: reads.append(path) or np.array(leaf))

    folded = canonical.fold(registry.symmetry_of(network_of(stored)), tree.map_leaves(watch, stored.params))
    assert all(path.endswith("scale") for path in reads)  # gains, which must not be zero before some readers
    reads.clear()
    flatten(folded)[path].read()
    assert set(reads) == needed
