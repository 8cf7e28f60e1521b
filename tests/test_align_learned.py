"""Learned alignment: never worse than its start, exact, blind to labels, and better where matching was led astray."""

import dataclasses

import jax
import numpy as np
import pytest
from small_models import random_params

from jaxtune import symmetry, tree
from jaxtune.align import memory
from jaxtune.align.learned import match_learned
from jaxtune.align.learning import Training, learn_element
from jaxtune.align.learning_steps import Task, mix_examples
from jaxtune.align.registry import find_element
from jaxtune.align.relaxed import make_plan
from jaxtune.errors import ConfigError, DataError, SpecError, UnknownNameError
from jaxtune.evaluate.equivalence import check_equivalence
from jaxtune.models import mlp, registry, vit
from jaxtune.sample import Sample
from jaxtune.sampling import Forward, Record
from jaxtune.symmetry import canonical

KEY = jax.random.key(0)
MLP = mlp.Config(image_shape=(4, 4, 1), widths=(8,), num_outputs=5)
VIT = vit.Config(image_size=8, patch_size=4, width=16, depth=1, num_heads=2, mlp_width=20, num_outputs=5, channels=1)
TRAINING = Training(
    num_steps=60,
    batch_size=16,
    learning_rate=1e-2,
    order_rate=2e-2,
    residual_weight=0.1,
    validation_share=0.25,
    evaluate_every=20,
    patience=5,
)


def sample_of(config, num, seed=0):
    size = config.image_shape[:2] if isinstance(config, mlp.Config) else (config.image_size,) * 2
    images = np.random.default_rng(seed).normal(size=(num, *size, 1)).astype(np.float32)
    return Sample("images", {"image": images}, Forward(config), Record(config))


@pytest.fixture(scope="module")
def tower():
    """(spec of folded weights, source, target, planted element)."""
    plain = registry.symmetry_of(VIT)
    spec, source = canonical.canonical_spec(plain), canonical.fold(plain, random_params(VIT, dtype=np.float32))
    planted = symmetry.random(jax.random.key(4), spec)
    return spec, source, symmetry.apply(spec, planted, source), planted


def nearly(spec, element, size, seed=0):
    """An element near another: rotations and maps a little off."""
    draw = np.random.default_rng(seed)
    off = symmetry.identity(spec)
    for name, group in spec.groups.items():
        if group.kind == "general_linear":
            off[name] = off[name] + size * draw.normal(size=off[name].shape)
        if group.kind == "centred_orthogonal":
            skew = size * draw.normal(size=off[name].shape)
            skew = skew - skew.mean(0)
            skew = skew - skew.mean(1, keepdims=True)
            skew = skew - skew.T
            off[name] = np.linalg.solve(np.eye(len(skew)) - skew, np.eye(len(skew)) + skew)
    return symmetry.compose(spec, off, element)


@pytest.fixture(scope="module")
def learned(tower):
    spec, source, target, planted = tower
    start = nearly(spec, planted, 0.1)
    found = learn_element(KEY, spec, target, source, sample=sample_of(VIT, 64), start=start, training=TRAINING)
    return start, found


def test_an_element_a_little_off_is_brought_back(tower, learned):
    """A planted pair has loss 0 under the planted element, and under no start near it."""
    spec, source, target, _ = tower
    start, found = learned
    assert found.start_loss > 0.01
    assert found.loss < 0.2 * found.start_loss
    assert found.losses[0] == (0, found.start_loss)
    assert found.loss == min(loss for _, loss in found.losses)

    def apart(element):
        moved = tree.flatten(symmetry.apply(spec, element, source))
        return sum(np.sum((moved[path] - leaf) ** 2) for path, leaf in tree.flatten(target).items())

    assert apart(found.element) < 0.5 * apart(start)


def test_what_is_learned_is_an_exact_symmetry(tower, learned):
    spec, source, _, _ = tower
    moved = symmetry.apply(spec, learned[1].element, source)
    first, second = (canonical.lay_out(spec.form, params) for params in (source, moved))
    outputs = jax.jit(lambda params, batch: registry.apply(VIT, params, batch))
    assert check_equivalence(outputs, first, second, sample_of(VIT, 16, seed=9).batch).is_exact


def test_losses_are_those_of_a_loop_over_probabilities(tower):
    """The objective, written out for the middle of the line and for a moved update."""
    spec, source, target, planted = tower
    batch = sample_of(VIT, 6).batch
    plan = make_plan(spec, orders="held")
    forward = Forward(VIT)
    latents = {name: {"map": np.zeros((2, 8, 8), np.float32)} for name in ("block_0/attn/qk", "block_0/attn/vo")}
    latents["stream"] = {"map": np.zeros((15, 15), np.float32)}
    trees = {"source": tree.flatten(source)}  # the target computes something else: the teacher is the mean of both
    trees["target"] = {path: leaf * np.float32(1.3) for path, leaf in tree.flatten(target).items()}
    trees["finetuned"] = {path: leaf * np.float32(1.1) for path, leaf in trees["source"].items()}
    trees["vector"] = {path: leaf * np.float32(0.1) for path, leaf in trees["source"].items()}

    def predict(leaves):
        logits = np.asarray(forward(canonical.lay_out(spec.form, tree.unflatten(leaves)), batch), np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def divergence(teacher, model):
        return np.mean(
            [sum(p * np.log(p / q) for p, q in zip(*rows, strict=True)) for rows in zip(teacher, model, strict=True)]
        )

    def between(share):
        return {path: share * leaf + (1 - share) * trees["target"][path] for path, leaf in trees["source"].items()}

    expected = {
        "interpolation": divergence(
            (predict(trees["source"]) + predict(trees["target"])) / 2, predict(between(np.float32(0.45)))
        ),
        "transport": divergence(
            predict(trees["finetuned"]),
            predict({path: leaf + np.float32(0.45) * trees["vector"][path] for path, leaf in trees["target"].items()}),
        ),
    }
    apart = sum(np.sum((trees["target"][path] - leaf) ** 2.0) for path, leaf in trees["source"].items())
    whole = sum(np.sum(leaf**2.0) for name in ("source", "target") for leaf in trees[name].values())
    for objective, value in expected.items():
        task = Task(plan, spec.form, forward, objective, tuple(spec.axes), 6, False)
        found, residual = jax.jit(lambda task=task: task.divergence(latents, {}, trees, batch, 0.45, is_hard=True))()
        assert found == pytest.approx(value, rel=1e-4), objective
        assert residual == pytest.approx(apart / whole, rel=1e-4)
    del planted


@pytest.mark.parametrize("orders", ["straight_through", "sinkhorn"])
def test_swapped_units_are_swapped_back(orders):
    spec, source = registry.symmetry_of(MLP), random_params(MLP, dtype=np.float32)
    planted = symmetry.random(jax.random.key(2), spec)
    target = symmetry.apply(spec, planted, source)
    start = {name: np.array(order) for name, order in planted.items()}
    start["layer_0/hidden"][[1, 5]] = start["layer_0/hidden"][[5, 1]]
    training = dataclasses.replace(TRAINING, order_rate=5e-2 if orders == "straight_through" else 0.2)
    found = learn_element(
        KEY, spec, target, source, sample=sample_of(MLP, 64), start=start, orders=orders, training=training
    )
    np.testing.assert_array_equal(found.element["layer_0/hidden"], planted["layer_0/hidden"])
    assert found.start_loss > 1e-3
    assert found.loss < 1e-9


def test_labels_change_nothing_and_one_seed_gives_one_result(tower):
    spec, source, target, planted = tower
    sample, start = sample_of(VIT, 64), nearly(spec, planted, 0.1)
    labelled = dataclasses.replace(sample, batch={**sample.batch, "label": np.arange(64, dtype=np.int32) % 5})
    training = dataclasses.replace(TRAINING, num_steps=20)
    plain, told = (
        learn_element(KEY, spec, target, source, sample=one, start=start, training=training)
        for one in (sample, labelled)
    )
    assert plain.losses == told.losses
    for name in spec.groups:
        np.testing.assert_array_equal(plain.element[name], told.element[name])


def test_a_killed_training_goes_on_where_it_was(tower, tmp_path, monkeypatch):
    spec, source, target, planted = tower
    start, sample = nearly(spec, planted, 0.1), sample_of(VIT, 64)

    def learn():
        return learn_element(KEY, spec, target, source, sample=sample, start=start, training=TRAINING)

    whole = learn()
    kept = memory.keep_progress

    def keep_and_die(*arguments):
        kept(*arguments)
        raise KeyboardInterrupt

    with memory.remember_searches(tmp_path):
        for name in ("jaxtune.align.learning.keep_progress",):
            monkeypatch.setattr(name, keep_and_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                learn()
        monkeypatch.setattr("jaxtune.align.learning.keep_progress", kept)
        resumed = learn()
    assert resumed.losses == whole.losses
    for name in spec.groups:
        np.testing.assert_array_equal(resumed.element[name], whole.element[name])


def test_the_named_methods_never_end_above_their_start(tower):
    spec, source, target, _ = tower
    options = {"batch_size": 16, "validation_share": 0.25, "num_steps": 20}
    found = match_learned(KEY, spec, target, source, sample=sample_of(VIT, 64), **options)
    assert found.loss <= found.start_loss
    assert found.start_loss < 1e-4  # matching finds a planted element by itself
    spec, source = registry.symmetry_of(MLP), random_params(MLP, dtype=np.float32)
    other = random_params(MLP, seed=1, dtype=np.float32)
    for method in ("straight_through", "sinkhorn"):
        found = find_element(KEY, spec, other, source, method=method, sample=sample_of(MLP, 64), **options)
        assert found.loss <= found.start_loss
        symmetry.check(spec, found.element)


def test_mixed_examples_lie_between_two():
    batch = {"image": np.arange(24, dtype=np.float32).reshape(4, 3, 2), "text": np.arange(20).reshape(4, 5)}
    mixed = {name: np.asarray(values) for name, values in mix_examples(KEY, batch).items()}
    for n in range(4):
        own, other = batch["image"][n], batch["image"][n - 1]
        shares = (mixed["image"][n] - other) / (own - other)
        np.testing.assert_allclose(shares, shares.flat[0], atol=1e-5)
        assert 0 <= shares.flat[0] <= 1
        is_own = mixed["text"][n] == batch["text"][n]
        assert (np.diff(is_own.astype(int)) <= 0).all()
        np.testing.assert_array_equal(mixed["text"][n][~is_own], batch["text"][n - 1][~is_own])


def test_what_cannot_be_learned_is_refused(tower):
    spec, source, target, planted = tower
    sample = sample_of(VIT, 8)

    def learn(spec=spec, sample=sample, training=TRAINING, **options):
        return learn_element(KEY, spec, target, source, sample=sample, start=planted, training=training, **options)

    with pytest.raises(DataError, match=r"a share of 0\.25 of 1 examples"):
        learn(sample=sample.take([0]))
    with pytest.raises(UnknownNameError, match="Did you mean 'transport'"):
        learn(objective="transprt")
    dark = dataclasses.replace(sample, batch={"image": sample.batch["image"] * np.float32(np.nan)})
    with pytest.raises(DataError, match="images: 'image' holds NaN"):
        learn(sample=dark)  # no loss would be finite, and the start come back as if nothing were better
    with pytest.raises(ConfigError, match="scale is nan"):
        learn(objective="transport", finetuned=source, scale=float("nan"))
    with pytest.raises(ConfigError, match="needs finetuned="):
        learn(objective="transport")
    with pytest.raises(ConfigError, match="num_steps is 0"):
        learn(training=dataclasses.replace(TRAINING, num_steps=0))
    with pytest.raises(ConfigError, match="learning_rate is nan"):
        learn(training=dataclasses.replace(TRAINING, learning_rate=float("nan")))
    plain = random_params(VIT, dtype=np.float32)
    each = registry.symmetry_of(VIT, junctions="each")
    options = {"sample": sample, "start": symmetry.identity(each), "training": TRAINING}
    with pytest.raises(SpecError, match='junctions="shared"'):
        learn_element(KEY, each, plain, plain, **options)
