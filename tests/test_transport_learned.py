"""Transport by a learned element: exact onto a planted copy, never worse on held-out inputs than where it starts."""

import jax
import numpy as np
import pytest
from small_models import FAST, random_params

from jaxtune import symmetry, tree
from jaxtune.models import mlp, registry, vit
from jaxtune.sample import Sample
from jaxtune.sampling import Forward, Record
from jaxtune.symmetry import canonical
from jaxtune.transport.prepared import apply_transport
from jaxtune.transport.registry import prepare_transport

KEY = jax.random.key(0)
VIT = vit.Config(image_size=8, patch_size=4, width=16, depth=1, num_heads=2, mlp_width=20, num_outputs=5, channels=1)
MLP = mlp.Config(image_shape=(4, 4, 1), widths=(8,), num_outputs=5)
OPTIONS = {"num_steps": 20, "batch_size": 16, "validation_share": 0.25}


def sample_of(config, num=64):
    size = config.image_shape[:2] if isinstance(config, mlp.Config) else (config.image_size,) * 2
    images = np.random.default_rng(0).normal(size=(num, *size, 1)).astype(np.float32)
    return Sample("images", {"image": images}, Forward(config), Record(config))


def tune(params, seed):
    draw = np.random.default_rng(seed)
    return tree.map_leaves(lambda _, x: x + (0.05 * draw.normal(size=x.shape)).astype(np.float32), params)


run = jax.jit(registry.apply, static_argnums=0, compiler_options=FAST)


def test_onto_a_planted_copy_the_fine_tune_arrives():
    spec = registry.symmetry_of(VIT)
    source = random_params(VIT, dtype=np.float32)
    finetuned = tune(source, 1)
    folded = canonical.canonical_spec(spec)
    planted = symmetry.random(jax.random.key(3), folded)
    target = canonical.realise(spec, symmetry.apply(folded, planted, canonical.fold(spec, source)), like=source)
    sample = sample_of(VIT)
    prepared = prepare_transport(
        KEY, lambda: spec, source, finetuned, target, method="learned", sample=sample, start="agreement", **OPTIONS
    )
    moved = apply_transport(prepared, target)
    np.testing.assert_allclose(run(VIT, moved, sample.batch), run(VIT, finetuned, sample.batch), atol=2e-3)
    other = tune(source, 2)
    again = tree.apply_task_vector(target, prepared.move(other))
    np.testing.assert_allclose(run(VIT, again, sample.batch), run(VIT, other, sample.batch), atol=2e-3)
    assert prepared.info["num_held"] == 16


def test_between_unrelated_bases_the_held_out_loss_never_rises():
    spec = registry.symmetry_of(VIT)
    source, target = (random_params(VIT, seed=seed, dtype=np.float32) for seed in (0, 1))
    options = OPTIONS | {"num_steps": 40}
    sample = sample_of(VIT)
    prepared = prepare_transport(
        KEY, lambda: spec, source, tune(source, 2), target, method="learned", sample=sample, **options
    )
    first, *rest = (loss for _, loss in prepared.info["losses"])
    assert min(rest) < first
    assert jax.tree.structure(prepared.task_vector) == jax.tree.structure(target)


@pytest.mark.parametrize("objective", ["transport", "interpolation"])
def test_a_family_without_a_folded_form_is_moved_by_orders(objective):
    spec, source = registry.symmetry_of(MLP), random_params(MLP, dtype=np.float32)
    finetuned = tune(source, 1)
    planted = symmetry.random(jax.random.key(3), spec)
    target = symmetry.apply(spec, planted, source)
    options = OPTIONS | {"objective": objective, "orders": "sinkhorn", "start": "agreement"}
    prepared = prepare_transport(
        KEY, lambda: spec, source, finetuned, target, method="learned", sample=sample_of(MLP), **options
    )
    np.testing.assert_array_equal(prepared.element["layer_0/hidden"], planted["layer_0/hidden"])
    expected = tree.flatten(symmetry.apply(spec, planted, finetuned))
    for path, leaf in tree.flatten(apply_transport(prepared, target)).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6)
