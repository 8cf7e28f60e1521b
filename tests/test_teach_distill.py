"""Distillation: a plain loop's numbers, a planted teacher, what protects a support set, and going on after a kill."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import tree
from jaxtune.commands.options import parse_options
from jaxtune.compose.fewshot import tune_few
from jaxtune.data import ArraySource
from jaxtune.errors import ConfigError, DataError, NonFiniteError, TreeMismatchError, UnknownNameError
from jaxtune.gradients import predict
from jaxtune.models import mlp, registry, vit
from jaxtune.sampling import make_sample
from jaxtune.teach import descent
from jaxtune.teach.distill import distill, teach_sample
from jaxtune.teach.judging import hold_out
from jaxtune.teach.weights import whole_weights
from jaxtune.train.checkpoints import StateSeries
from jaxtune.transport.prepared import apply_transport
from jaxtune.transport.registry import METHODS, prepare_transport

CONFIG = mlp.Config(image_shape=(8, 8, 1), widths=(16,), num_outputs=3, activation="gelu")
VIT = vit.Config(
    image_size=8, patch_size=4, width=16, depth=1, num_heads=2, mlp_width=24, num_outputs=3, channels=1
)  # fmt: skip
KEY = jax.random.key(0)
PATTERNS = {"lora_patterns": ("*/kernel",)}
QUICK = {"num_steps": 20, "batch_size": 8, "learning_rate": 3e-3, "key": KEY}


def draw_sample(seed, count, name="dots", config=CONFIG, pictures=0):
    """Three pictures under noise, in turn."""
    draw, labels = np.random.default_rng(seed), np.arange(count) % 3
    clean = np.random.default_rng(100 + pictures).uniform(size=(3, 8, 8, 1))[labels]
    images = (255 * (0.5 * clean + 0.5 * draw.uniform(size=clean.shape))).astype(np.uint8)
    return make_sample(config, ArraySource(name, "train", images, labels, ("a", "b", "c")))


@pytest.fixture(scope="module")
def sample():
    return draw_sample(0, 24)


def draw_networks(config):
    """(teacher, new base): of two seeds, with logits far enough apart to see what is learned."""
    teacher, base = (jax.tree.map(np.asarray, registry.init(jax.random.key(seed), config)) for seed in (0, 1))
    return tree.map_leaves(lambda path, x: 3 * x if path == "head/kernel" else x, teacher), base


@pytest.fixture(scope="module")
def networks():
    return draw_networks(CONFIG)


def divergence(sample, teacher, params):
    theirs, ours = (jax.nn.log_softmax(predict(sample, one)) for one in (teacher, params))
    return float(np.mean(np.sum(np.exp(theirs) * (theirs - ours), axis=-1)))


def agreement(first, second):
    return max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def distance(first, second):
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree.task_vector(first, second)))))


def test_all_examples_at_once_are_plain_adam(networks, sample):
    """Every batch is the whole sample, so the order does not matter: the oracle is optax's own AdamW on the KL."""
    teacher, base = networks
    found = distill(sample, teacher, base, key=KEY, num_steps=20, batch_size=24, learning_rate=2e-3, held_out=0.0)
    theirs = jax.nn.softmax(jnp.asarray(predict(sample, teacher)))
    rates = 2e-3 * np.array([0.5, 1.0, *(0.05 + 0.95 * (1 + np.cos(np.pi * np.arange(18) / 18)) / 2)])

    @jax.jit
    def gradient_of(params):
        def loss(params):
            ours = jax.nn.log_softmax(sample.forward(params, {"image": sample.batch["image"]}))
            return -jnp.mean(jnp.sum(theirs * ours, axis=-1))

        return jax.grad(loss)(params)

    params = jax.tree.map(jnp.asarray, base)
    adam = optax.scale_by_adam()
    state = adam.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for rate in rates:
            gradient = gradient_of(params)
            length = float(optax.tree.norm(gradient))
            gradient = jax.tree.map(lambda g, length=length: g / max(1.0, length), gradient)
            updates, state = adam.update(gradient, state)
            params = jax.tree.map(lambda p, u, rate=rate: p - rate * u, params, updates)
    assert agreement(found.params, base) > 5e-3
    assert agreement(found.params, params) < 1e-4
    assert found.info["num_held"] == 0
    assert found.info["step"] == 20


def test_the_student_comes_to_say_what_the_teacher_says(networks, sample):
    teacher, base = networks
    fresh = draw_sample(9, 64)
    found = distill(sample.without_labels(), teacher, base, **QUICK | {"num_steps": 60, "learning_rate": 1e-2})
    assert divergence(fresh, teacher, found.params) < 0.5 * divergence(fresh, teacher, base)
    assert jax.tree.map(lambda x: x.dtype, found.params) == jax.tree.map(lambda x: x.dtype, base)


def test_every_epoch_sees_every_example_once_and_in_another_order(networks, sample):
    """With a rate of almost nothing, the loss of a step is that of its batch."""
    teacher, base = networks
    loss, taught = teach_sample(sample, teacher, base)
    _, info = descent.descend(
        whole_weights(base), descent.Aim(loss), taught, key=KEY, num_steps=6, batch_size=8, round_size=1,
        learning_rates=[1e-12],
    )  # fmt: skip
    losses = np.array(info["losses"][0])
    whole = float(np.mean(loss(base, taught.batch)))
    np.testing.assert_allclose([losses[:3].mean(), losses[3:].mean()], whole, rtol=1e-5)
    assert len(set(np.round(losses, 6))) > 4


def test_the_best_of_rates_and_rounds_is_kept_and_never_behind_the_start(networks, sample):
    teacher, base = networks
    found = distill(sample, teacher, base, **QUICK | {"learning_rate": (1e-3, 1e-2, 1e4)})
    scores = found.info["scores"]
    assert found.info["score"] == min(min(row) for row in scores if row)
    assert [len(row) for row in scores][:2] == [3, 2]  # the start, then two rounds for each rate
    best = int(np.argmin([min(row) for row in scores[:2]]))
    assert found.info["learning_rate"] == (1e-3, 1e-2)[best]
    held = hold_out(sample, 0.2, jax.random.key(0))[1]
    assert len(held) == found.info["num_held"] == 5
    hopeless = distill(sample, teacher, base, **QUICK | {"learning_rate": 1e4})
    assert hopeless.info["step"] == 0
    jax.tree.map(np.testing.assert_array_equal, hopeless.params, base)


def test_a_start_is_left_only_for_as_much_as_the_margin(networks, sample):
    teacher, base = networks
    way = tree.task_vector(base, teacher)
    nearly = jax.tree.map(lambda x, step: np.asarray(x + 0.9 * step), base, way)
    for start, gap in ((nearly, "small"), (base, "large")):
        free = distill(sample, teacher, start, **QUICK)
        bound = distill(sample, teacher, start, margin=0.05, **QUICK)
        assert free.info["step"] > 0, gap
        assert (bound.info["step"] == 0) == (gap == "small")
        assert agreement(bound.params, start if gap == "small" else free.params) == 0
    with pytest.raises(ConfigError, match="margin is 1"):
        distill(sample, teacher, base, margin=1.0, **QUICK)


def test_a_teacher_that_agrees_teaches_nothing(networks, sample):
    _, base = networks
    found = distill(sample, base, base, **QUICK)
    jax.tree.map(np.testing.assert_array_equal, found.params, base)
    assert found.info["step"] == 0


def test_hard_targets_are_the_teachers_classes_and_labels_the_samples_own(networks, sample):
    teacher, base = networks
    hard = distill(sample, teacher, base, targets="hard", **QUICK)
    labels = np.argmax(predict(sample, teacher), axis=-1).astype(np.int32)
    spoken = replace(sample, batch={**sample.batch, "label": labels})
    # Held-out examples are drawn by class where there are labels, so the two are compared without.
    hard, own = (
        distill(sample if targets == "hard" else spoken, teacher, base, targets=targets, **QUICK | {"held_out": 0.0})
        for targets in ("hard", "labels")
    )
    jax.tree.map(np.testing.assert_array_equal, hard.params, own.params)


def test_another_forward_may_ask_the_teacher(networks, sample):
    teacher, base = networks
    half = tree.map_leaves(lambda path, x: x / 2 if path.startswith("head") else x, teacher)
    doubled = distill(sample, half, base, teacher_forward=Doubled(sample.forward), **QUICK)
    plain = distill(sample, teacher, base, **QUICK)
    assert agreement(doubled.params, plain.params) < 1e-5


class Doubled:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, params, batch):
        return 2 * self.forward(params, batch)


def test_a_support_set_is_kept(networks, sample):
    teacher, base = networks
    support, fresh = draw_sample(3, 32, "support", pictures=1), draw_sample(4, 64, pictures=1)
    quick = QUICK | {"num_steps": 60, "held_out": 0.0}
    free = distill(sample, teacher, base, **quick)
    kept = distill(sample, teacher, base, support=support.without_labels(), protect=10.0, **quick)
    anchored = distill(sample, teacher, base, anchor=10.0, **quick)
    moved = divergence(fresh, base, free.params)
    assert divergence(fresh, base, kept.params) < 0.5 * moved
    assert distance(anchored.params, base) < 0.5 * distance(free.params, base)
    replayed = distill(sample, teacher, base, support=support, protect=10.0, **quick)
    labels = support.batch["label"]

    def loss(params):
        return -float(np.mean(np.asarray(jax.nn.log_softmax(predict(support, params)))[np.arange(32), labels]))

    assert loss(replayed.params) < loss(kept.params)


@pytest.mark.parametrize("learn", ["lora", "scales", "rotation"])
def test_less_than_the_weights_can_be_learned(learn):
    (teacher, base), sample = draw_networks(VIT), draw_sample(0, 24, config=VIT)
    start = tree.map_leaves(lambda _, a, b: a + np.float32(0.3) * b, base, teacher)
    spec = registry.symmetry_of(VIT)
    found = distill(
        sample, teacher, start, base=base, learn=learn, spec=spec, lora_rank=2, **QUICK | {"learning_rate": 0.03}
    ).params
    assert divergence(sample, teacher, found) < divergence(sample, teacher, start)
    leaves, before, added = (
        {path: np.asarray(x, np.float64) for path, x in tree.flatten(one).items()} for one in (found, start, base)
    )
    for path, leaf in leaves.items():
        if learn == "lora":
            rows = 2 * 8 if path.endswith("out/kernel") else len(leaf)
            change = (leaf - before[path]).reshape(rows, -1) if leaf.ndim > 1 else leaf - before[path]
            is_adapted = "/attn/" in path or "/mlp/" in path
            if not (is_adapted and path.endswith("kernel")):
                assert not change.any(), path
            else:
                assert (np.linalg.svd(change, compute_uv=False) > 1e-5).sum() <= 2
        elif learn == "scales":
            old = before[path] - added[path]
            if np.any(old):
                factors = (leaf - added[path])[np.abs(old) > 0.01] / old[np.abs(old) > 0.01]
                np.testing.assert_allclose(factors, factors.mean(), rtol=1e-3)
        elif path == "block_0/mlp/up/kernel":  # turned on the stream's axis alone: what it writes keeps its lengths
            ours, theirs = leaf - added[path], before[path] - added[path]
            ratio = np.linalg.norm(ours, axis=0) / np.linalg.norm(theirs, axis=0)
            np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)
            assert np.abs(ours / ratio.mean() - theirs).max() > 1e-3


class Killed(Exception):
    """As if the process had ended."""


@pytest.mark.parametrize("kill_after", [1, 2, 3])
def test_a_killed_run_goes_on_bit_for_bit(kill_after, networks, sample, tmp_path, monkeypatch):
    teacher, base = networks
    monkeypatch.setattr(descent, "SAVE_EVERY", 1)
    how = QUICK | {"learning_rate": (1e-3, 1e-2), "support": draw_sample(3, 24, "support")}
    whole = distill(sample, teacher, base, **how)
    with StateSeries(tmp_path / "states") as series:
        saved, real = [], series.save

        def save(state, progress):
            real(state, progress)
            saved.append(int(state.step))
            if len(saved) == kill_after:
                raise Killed

        series.save = save
        with pytest.raises(Killed):
            distill(sample, teacher, base, series=series, **how)
    with StateSeries(tmp_path / "states") as series:
        assert series.latest_step == 10 * kill_after
        resumed = distill(sample, teacher, base, series=series, **how)
        with pytest.raises(ConfigError, match="states are of a run with"):
            distill(sample, teacher, base, series=series, **how | {"learning_rate": (1e-3, 2e-2)})
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert resumed.info == whole.info


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_few_labels_tune_a_network(lora_rank, networks):
    _, base = networks
    sample, fresh = draw_sample(0, 30), draw_sample(5, 60)
    found = tune_few(sample, base, key=KEY, num_epochs=20, min_steps=20, batch_size=8, lora_rank=lora_rank, **PATTERNS)

    def accuracy(params):
        return np.mean(np.argmax(predict(fresh, params), axis=-1) == fresh.batch["label"])

    assert accuracy(found.params) > 0.9 > accuracy(base)
    assert len(found.info["scores"]) == 3
    assert found.info["num_held"] == 6
    other = tune_few(sample, base, key=KEY, num_epochs=1, min_steps=10, batch_size=8, validation=sample)
    assert other.info["num_held"] == other.info["num_examples"] == 30


def test_what_cannot_be_learned_is_refused(networks, sample):
    teacher, base = networks
    with pytest.raises(UnknownNameError, match="lora, rotation, scales, weights"):
        distill(sample, teacher, base, learn="head")
    with pytest.raises(UnknownNameError, match="hard, labels, soft"):
        distill(sample, teacher, base, targets="mean")
    with pytest.raises(ConfigError, match="nothing to weigh"):
        distill(sample, teacher, base, learn="scales")
    with pytest.raises(ConfigError, match="needs spec="):
        distill(sample, teacher, base, learn="rotation")
    with pytest.raises(ConfigError, match="held_out is 1"):
        distill(sample, teacher, base, held_out=1.0)
    with pytest.raises(ConfigError, match="must be held out"):
        distill(sample, teacher, base, held_out=0.0, learning_rate=(1e-3, 1e-2))
    with pytest.raises(ConfigError, match="protect is -1"):
        distill(sample, teacher, base, protect=-1.0)
    with pytest.raises(DataError, match="no examples"):
        distill(sample.take([]), teacher, base)
    odd = draw_sample(1, 4, "support")
    odd = replace(odd, batch={"image": odd.batch["image"] * np.nan})
    with pytest.raises(DataError, match=r"support.*NaN"):
        distill(sample, teacher, base, support=odd)
    with pytest.raises(DataError, match="no labels"):
        tune_few(sample.without_labels(), base)
    with pytest.raises(TreeMismatchError, match="base and start differ"):
        distill(sample, teacher, base, base={"a": np.zeros(3, np.float32)})
    with pytest.raises(NonFiniteError, match="the teacher holds NaN"):
        distill(sample, tree.map_leaves(lambda _, x: x * np.nan, teacher), base)
    with pytest.raises(NonFiniteError, match="diverged"):
        distill(sample, teacher, base, **QUICK | {"held_out": 0.0, "learning_rate": 1e30})


def test_options_without_a_default_can_be_said_in_words():
    said = parse_options(["learning_rate=0.01", "num_steps=5"], METHODS["distill"].options, "it")
    assert said == {"learning_rate": 0.01, "num_steps": 5}
    assert parse_options(["learning_rate=None"], METHODS["distill"].options, "it") == {"learning_rate": None}


@pytest.mark.parametrize("start", ["base", "permutation"])
def test_as_a_transport_the_student_stands_at_scale_one(start, networks, sample):
    finetuned, target = networks
    source = registry.init(jax.random.key(5), CONFIG)
    symmetry = partial(registry.symmetry_of, CONFIG)
    prepared = prepare_transport(
        KEY, symmetry, source, finetuned, target, method="distill", sample=sample, start=start, num_steps=20
    )
    begun = target
    if start == "permutation":
        begun = apply_transport(
            prepare_transport(KEY, symmetry, source, finetuned, target, method="permutation"), target
        )
    student = distill(sample, finetuned, begun, base=target, key=KEY, num_steps=20)
    assert agreement(apply_transport(prepared, target), student.params) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, apply_transport(prepared, target, 0.0), target)
    assert prepared.info["distilled"] == student.info
    with pytest.raises(ConfigError, match="needs unlabelled inputs"):
        prepare_transport(KEY, symmetry, source, finetuned, target, method="distill")
    with pytest.raises(UnknownNameError, match="start"):
        prepare_transport(KEY, symmetry, source, finetuned, target, method="distill", sample=sample, start="gradfix")


@pytest.mark.parametrize("learn", ["weights", "lora"])
def test_a_choice_is_made_again_from_its_rate_and_steps(sample, networks, learn):
    """What cross-validation stands on: fewer steps of a schedule are the first of it."""
    teacher, base = networks
    rest, held = sample.split(0.25)
    how = QUICK | {"learn": learn, "lora_rank": 2} | PATTERNS
    found = distill(rest, teacher, base, **how | {"learning_rate": (1e-3, 1e-2)}, validation=held, errors=0.0)
    step, rate = found.info["step"], found.info["learning_rate"]
    assert found.info["num_held"] == len(held)
    assert step > 0
    again = how | {"learning_rate": rate, "num_steps": step, "schedule_steps": QUICK["num_steps"], "held_out": 0.0}
    made = distill(rest, teacher, base, **again)
    jax.tree.map(np.testing.assert_array_equal, dict(made.params), dict(found.params))
    with pytest.raises(ConfigError, match="a schedule of 4 steps is shorter than the 5 to take of it"):
        distill(rest, teacher, base, **again | {"num_steps": 5, "schedule_steps": 4})


def test_leaving_the_start_asks_for_more_than_a_chance(sample, networks):
    teacher, base = networks
    rest, held = sample.split(0.25)
    how = QUICK | {"validation": held}
    assert distill(rest, teacher, base, **how, errors=0.0).info["step"] > 0
    stayed = distill(rest, teacher, base, **how, errors=1e6)
    assert stayed.info["step"] == 0
    jax.tree.map(np.testing.assert_array_equal, dict(stayed.params), dict(base))
