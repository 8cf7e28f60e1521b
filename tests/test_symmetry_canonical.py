"""Folded weights: the same function, the whole group, and the way back."""

import functools

import jax
import numpy as np
import pytest

from jaxtune import symmetry, tree
from jaxtune.align.weights import match_weights
from jaxtune.errors import SpecError
from jaxtune.evaluate.example import apply_to_matrix, example_batch
from jaxtune.models import clip, mlp, registry, vit
from jaxtune.symmetry import canonical
from jaxtune.transport.prepared import apply_transport
from jaxtune.transport.registry import prepare_transport

SMALL = {
    "image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 24, "num_outputs": 5,
    "channels": 1,
}  # fmt: skip
VITS = {
    "plain": {},
    "no head bias": {"head_bias": False},
    "mean pooling": {"pooling": "mean", "patch_bias": False, "activation": "quick_gelu"},
}


def random_params(config, seed, *, scale=0.1):
    """Every leaf away from its initial value: gains off one, offsets and biases off zero; float64."""
    draw = np.random.default_rng(seed)
    params = registry.init(jax.random.key(seed), config)
    return tree.map_leaves(lambda _, x: np.asarray(x, np.float64) + scale * draw.normal(size=x.shape), params)


def outputs(config, params, dtype=np.float64):
    batch = example_batch(jax.random.key(9), config, 4)
    batch = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in batch.items()}
    return np.asarray(apply_to_matrix(config, params, batch))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", VITS)
@pytest.mark.usefixtures("x64")
def test_folding_and_every_element_of_the_whole_group_keep_the_function(name):
    config = vit.Config(**SMALL | VITS[name])
    spec, params = registry.symmetry_of(config), random_params(config, 0)
    whole, folded = canonical.canonical_spec(spec), canonical.fold(spec, params)
    before = outputs(config, params)
    assert before.dtype == np.float64
    np.testing.assert_allclose(outputs(config, canonical.realise(spec, folded, params)), before, atol=1e-10)
    element = symmetry.random(jax.random.key(1), whole)
    moved = symmetry.apply(whole, element, folded)
    np.testing.assert_allclose(outputs(config, canonical.realise(spec, moved, params)), before, atol=1e-10)
    # Illegal: a rotation that does not keep the ones vector, which layer norm subtracts.
    tilted = {**element, "stream": np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]}
    with pytest.raises(SpecError, match="moves the ones vector"):
        symmetry.check(whole, tilted)
    # Illegal: the same rotation on weights that were not folded.
    turned = tree.map_leaves(
        lambda path, leaf: symmetry.element.apply_to_leaf(whole, element, path, leaf) if path in whole.axes else leaf,
        params,
    )
    assert np.abs(outputs(config, turned) - before).max() > 0.05 * np.abs(before).std()


@pytest.mark.parametrize("name", VITS)
def test_unfolding_undoes_folding_for_any_base(name):
    """fold(B + unfold(v)) = fold(B) + v for every change v that folded weights can have."""
    config = vit.Config(**SMALL | VITS[name])
    spec = registry.symmetry_of(config)
    source, tuned, base = (random_params(config, seed) for seed in range(3))
    change = tree.task_vector(canonical.fold(spec, source), canonical.fold(spec, tuned))
    unfolded = canonical.unfold(spec, change, base)
    assert unfolded.lost == {}
    result = canonical.fold(spec, tree.apply_task_vector(base, unfolded.task_vector))
    wanted = tree.apply_task_vector(canonical.fold(spec, base), change)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), result, wanted)
    gains = [path for path in tree.flatten(base) if path.endswith("scale")]
    assert all(not tree.flatten(unfolded.task_vector)[path].any() for path in gains)


def test_a_dead_gain_loses_what_lies_behind_it_and_says_so():
    config = vit.Config(**SMALL)
    spec = registry.symmetry_of(config)
    source, tuned, base = (random_params(config, seed) for seed in range(3))
    base["block_0"]["norm1"]["scale"][3] = 0.0
    change = tree.task_vector(canonical.fold(spec, source), canonical.fold(spec, tuned))
    lost = canonical.unfold(spec, change, base).lost
    assert set(lost) == {f"block_0/attn/{name}/kernel" for name in "qkv"}
    row = tree.flatten(change)["block_0/attn/q/kernel"]
    share = np.linalg.norm(row[3]) / np.linalg.norm(row)
    assert lost["block_0/attn/q/kernel"] == pytest.approx(share)


@pytest.mark.parametrize("name", ["plain", "no head bias"])
def test_a_planted_element_of_the_whole_group_is_found_and_carries_the_fine_tune(name):
    config = vit.Config(**SMALL | VITS[name])
    spec = registry.symmetry_of(config)
    source, tuned = (tree.map_leaves(lambda _, x: x.astype(np.float32), random_params(config, s)) for s in (0, 1))
    whole = canonical.canonical_spec(spec)
    planted = symmetry.random(jax.random.key(2), whole)
    target = canonical.realise(spec, symmetry.apply(whole, planted, canonical.fold(spec, source)), source)
    found = match_weights(
        jax.random.key(0), whole, canonical.fold(spec, target), canonical.fold(spec, source),
        head_cost="circuit", weighting="unit",
    )  # fmt: skip
    assert found.objective_of_identity < found.objective
    for group in planted:
        np.testing.assert_allclose(found.element[group], planted[group], atol=2e-3, err_msg=group)
    symmetry_of = functools.partial(registry.symmetry_of, config)
    prepared = prepare_transport(jax.random.key(0), symmetry_of, source, tuned, target, method="full")
    wanted = outputs(config, tuned, np.float32)
    carried = outputs(config, apply_transport(prepared, target), np.float32)
    np.testing.assert_allclose(carried, wanted, atol=1e-5 * np.abs(wanted).max() + 1e-5)
    # No permutation can express it.
    stuck = prepare_transport(jax.random.key(0), symmetry_of, source, tuned, target, method="permutation")
    assert np.abs(outputs(config, apply_transport(stuck, target), np.float32) - wanted).max() > 0.1 * wanted.std()


def test_the_entry_norm_of_clip_becomes_a_matrix_and_comes_back_as_a_diagonal():
    text = clip.TextConfig(vocab_size=11, context_length=6, width=16, depth=1, num_heads=2, mlp_width=24)
    vision = vit.Config(**SMALL | {"stream_norm": True, "head_bias": False, "num_outputs": 8, "patch_bias": False})
    config = clip.Config(vision=vision, text=text, embed_dim=8)
    spec = registry.symmetry_of(config)
    source, tuned, base = (random_params(config, seed) for seed in range(3))
    whole, folded = canonical.canonical_spec(spec), canonical.fold(spec, source)
    whole.check(folded)
    assert folded["vision"]["stream_norm"]["scale"].shape == (16, 16)
    change = tree.task_vector(folded, canonical.fold(spec, tuned))
    unfolded = canonical.unfold(spec, change, base)
    np.testing.assert_allclose(unfolded.lost["vision/stream_norm/scale"], 0, atol=1e-12)
    gain = tuned["vision"]["stream_norm"]["scale"] - source["vision"]["stream_norm"]["scale"]
    np.testing.assert_allclose(unfolded.task_vector["vision"]["stream_norm"]["scale"], gain, atol=1e-12)
    turned = symmetry.apply(whole, symmetry.random(jax.random.key(3), whole), change)
    assert 0.5 < canonical.unfold(spec, turned, base).lost["vision/stream_norm/scale"] < 1
    with pytest.raises(SpecError, match="a folded entry norm is a matrix"):
        canonical.realise(spec, folded, source)


def test_families_without_layer_norm_are_refused_by_name():
    spec = registry.symmetry_of(mlp.Config(image_shape=(4, 4, 1), widths=(8,), num_outputs=3))
    with pytest.raises(SpecError, match="declares no canonical form"):
        canonical.canonical_spec(spec)
