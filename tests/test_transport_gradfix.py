"""Masks by the signs of gradients: against a loop over examples, their laws, and an alignment in front of them."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import symmetry, tree
from jaxtune.data import ArraySource
from jaxtune.errors import ConfigError, DataError, UnknownNameError
from jaxtune.gradients import LabelLoss, TeacherLoss, with_teacher
from jaxtune.models import registry, vit
from jaxtune.sample import inputs_of
from jaxtune.sampling import make_sample
from jaxtune.transport.directions import matrix_shape
from jaxtune.transport.full import prepare_full
from jaxtune.transport.gradfix import (
    Rule,
    cast_votes,
    mask_prepared,
    prepare_align_then_mask,
    prepare_gradfix,
    prepare_gradfix_teacher,
)
from jaxtune.transport.prepared import apply_transport
from jaxtune.tree import flatten

CONFIG = vit.Config(
    image_size=8, patch_size=4, width=16, depth=1, num_heads=2, mlp_width=24, num_outputs=3, channels=1
)  # fmt: skip
KEY = jax.random.key(0)
SMALL = 1e-6  # a gradient below it may have either sign in another order of sums


def symmetry_of(**options):
    return registry.symmetry_of(CONFIG, **options)


def draw(seed):
    """Weights with nothing at a special value: a fresh network's biases and class token are zero."""
    state = np.random.default_rng(seed)
    params = registry.init(jax.random.key(seed), CONFIG)
    return tree.map_leaves(lambda _, x: np.asarray(x) + (0.1 * state.normal(size=x.shape)).astype(np.float32), params)


@pytest.fixture(scope="module")
def bases():
    """(old base, its fine-tune, new base)."""
    source, change = draw(0), draw(5)
    return source, tree.map_leaves(lambda _, a, b: a + np.float32(0.2) * b, source, change), draw(1)


@pytest.fixture(scope="module")
def sample():
    state = np.random.default_rng(0)
    images = state.integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    return make_sample(CONFIG, ArraySource("dots", "train", images, np.arange(9) % 3, ("a", "b", "c")))


@partial(jax.jit, static_argnums=0)
def one_gradient(forward, params, batch, target):
    def loss(params):
        return -jnp.sum(target * jax.nn.log_softmax(forward(params, batch)[0]))

    return jax.grad(loss)(params)


def loop_gradients(params, sample, targets=None):
    """{path: [N, ...]}: one plain gradient after the other; targets are probabilities, the labels' where None."""
    targets = np.eye(3, dtype=np.float32)[sample.batch["label"]] if targets is None else targets
    rows = []
    for n, target in enumerate(targets):
        rows.append(flatten(one_gradient(sample.forward, params, inputs_of(sample.take([n]).batch), target)))
    return {path: np.stack([np.asarray(row[path], np.float64) for row in rows]) for path in rows[0]}


def assert_masked(found, vector, gradients, votes=lambda g: np.sign(-g).sum(0)):
    """Kept where the sign is the vote's, zero elsewhere, as far as the signs are clear of rounding."""
    count = 0
    for path, leaf in flatten(found).items():
        clear = np.abs(gradients[path]).min(axis=0) > SMALL
        expected = np.where(np.sign(vector[path]) * np.sign(votes(gradients[path])) > 0, vector[path], 0)
        np.testing.assert_array_equal(np.asarray(leaf)[clear], expected[clear], err_msg=path)
        count += clear.sum()
    assert count > 0.9 * tree.count_parameters(found)


def test_the_majority_is_that_of_a_loop_over_examples(bases, sample):
    source, finetuned, target = bases
    prepared = prepare_gradfix(KEY, symmetry_of, *bases, sample=sample)
    vector = flatten(tree.task_vector(source, finetuned))
    assert_masked(prepared.task_vector, vector, loop_gradients(target, sample))
    assert 0.3 < prepared.info["kept"] < 0.7
    assert prepared.move is None


def test_a_mean_vote_never_climbs(bases, sample):
    """41: what is kept has a product with the gradient of minus the sum of both sizes, and the loss falls."""
    _, _, target = bases
    prepared = prepare_gradfix(KEY, symmetry_of, *bases, sample=sample, vote="mean")
    gradients = {path: leaf.mean(axis=0) for path, leaf in loop_gradients(target, sample).items()}
    moved = flatten(prepared.task_vector)
    product = sum(float(np.sum(gradients[path] * moved[path])) for path in moved)
    sizes = sum(float(np.sum(np.abs(gradients[path] * moved[path]))) for path in moved)
    assert product < 0
    np.testing.assert_allclose(product, -sizes, rtol=1e-4)
    loss = LabelLoss(sample.forward)

    def mean_loss(scale):
        return float(np.mean(loss(apply_transport(prepared, target, scale), sample.batch)))

    small = 1e-2
    np.testing.assert_allclose(mean_loss(small) - mean_loss(0.0), small * product, rtol=0.1)


def test_a_mask_depends_on_signs_alone(bases, sample):
    """42: entries stay whole or go, and neither the length of the task vector nor that of the loss matters."""
    source, finetuned, target = bases
    vector = flatten(tree.task_vector(source, finetuned))
    kept = flatten(prepare_gradfix(KEY, symmetry_of, *bases, sample=sample).task_vector)
    doubled = tree.apply_task_vector(source, tree.task_vector(source, finetuned), 2.0)
    twice = flatten(prepare_gradfix(KEY, symmetry_of, source, doubled, target, sample=sample).task_vector)
    for path, leaf in kept.items():
        assert np.all((leaf == vector[path]) | (leaf == 0))
        # The doubled task vector is a difference of rounded weights: some of its entries round to another sign.
        sure = np.abs(vector[path]) > 1e-6
        np.testing.assert_array_equal((twice[path] != 0)[sure], (leaf != 0)[sure], err_msg=path)


@dataclass(frozen=True)
class Weighed:
    """A loss whose examples have weights."""

    loss: LabelLoss

    def __call__(self, params, batch):
        return batch["scale"] * self.loss(params, {k: v for k, v in batch.items() if k != "scale"})


def test_weights_of_examples_matter_to_the_mean_alone(bases, sample):
    """43"""
    _, _, target = bases
    loss = LabelLoss(sample.forward)
    scale = np.random.default_rng(3).uniform(0.1, 4.0, len(sample)).astype(np.float32)
    heavy = replace(sample, batch={**sample.batch, "scale": scale})
    clear = {path: np.abs(leaf).min(axis=0) > SMALL for path, leaf in loop_gradients(target, sample).items()}
    for vote, matters in (("majority", False), ("mean", True)):
        plain = cast_votes(target, sample, loss, vote=vote)
        weighed = cast_votes(target, heavy, Weighed(loss), vote=vote)
        differ = np.concatenate([(np.sign(plain[path]) != np.sign(weighed[path]))[clear[path]] for path in plain])
        assert (differ.mean() > 0.02) if matters else not differ.any()


def test_of_one_example_both_votes_agree(bases, sample):
    """44"""
    one = sample.take([4])
    majority, mean = (
        prepare_gradfix(KEY, symmetry_of, *bases, sample=one, vote=vote).task_vector for vote in ("majority", "mean")
    )
    gradients = loop_gradients(bases[2], one)
    for path, leaf in flatten(majority).items():
        clear = np.abs(gradients[path][0]) > SMALL
        np.testing.assert_array_equal(leaf[clear], flatten(mean)[path][clear])


def test_masking_and_permuting_may_change_places(bases, sample):
    """45"""
    spec = symmetry_of()
    element = symmetry.random(jax.random.key(7), spec)
    moved = [symmetry.apply(spec, element, params) for params in bases]
    first = symmetry.apply(spec, element, prepare_gradfix(KEY, symmetry_of, *bases, sample=sample).task_vector)
    second = prepare_gradfix(KEY, symmetry_of, *moved, sample=sample).task_vector
    small = {path: np.abs(leaf).min(axis=0) <= SMALL for path, leaf in loop_gradients(moved[2], sample).items()}
    for path, leaf in flatten(first).items():
        np.testing.assert_array_equal(leaf[~small[path]], flatten(second)[path][~small[path]], err_msg=path)


def test_the_true_signs_keep_everything():
    """46"""
    entries = np.random.default_rng(0).normal(size=50).astype(np.float32)
    for vote, votes in (("majority", 9 * np.sign(entries).astype(np.int32)), ("mean", 0.3 * entries)):
        np.testing.assert_array_equal(Rule(vote).weigh(entries, votes, 9), entries)


def test_rules_by_hand():
    entries, votes = np.array([2.0, -3.0, 4.0, -5.0, 6.0, 0.0]), np.array([4, -2, -4, 4, 0, 4], np.int32)
    np.testing.assert_array_equal(Rule().weigh(entries, votes, 4), [2, -3, 0, 0, 0, 0])
    np.testing.assert_array_equal(Rule(mask="force").weigh(entries, votes, 4), [2, -3, -4, 5, 0, 0])
    # Of 4 examples z = 1.2 asks for a share above 0.6.
    np.testing.assert_array_equal(Rule(z=1.2).weigh(entries, votes, 4), [2, 0, 0, 0, 0, 0])
    soft = Rule(mask="soft", sharpness=2.0).weigh(entries, votes, 4)
    shares = np.array([1, -0.5, -1, 1, 0, 1])
    expected = entries / (1 + np.exp(-2 * shares * np.sign(entries)))
    np.testing.assert_allclose(soft, np.where(shares == 0, 0, expected), rtol=1e-12)
    assert soft[4] == 0
    corrected = Rule(mask="soft", z=0.4, sharpness=2.0).weigh(entries, votes, 4)
    np.testing.assert_allclose(corrected[1], -3 / (1 + np.exp(-2 * 0.3)), rtol=1e-12)


def test_directions_are_voted_on_as_in_a_loop(bases, sample):
    source, finetuned, target = bases
    vector = flatten(tree.task_vector(source, finetuned))
    gradients = loop_gradients(target, sample)
    prepared = [
        prepare_gradfix(KEY, symmetry_of, *bases, sample=sample, over="direction", vote=vote)
        for vote in ("majority", "mean")
    ]
    majority, mean = (flatten(one.task_vector) for one in prepared)
    # Of directions and biases about half; counted by entries nearly all, for a matrix of few directions is full too.
    assert 0.3 < prepared[0].info["kept"] < 0.7
    for path in ("block_0/mlp/up/kernel", "block_0/attn/q/kernel", "block_0/attn/out/kernel", "patch/kernel"):
        rows = {"patch/kernel": 16, "block_0/attn/out/kernel": 16}.get(path, 16)
        left, values, right = np.linalg.svd(vector[path].reshape(rows, -1), full_matrices=False)
        each = np.array([np.diag(left.T @ -one.reshape(rows, -1) @ right.T) for one in gradients[path]])
        assert np.abs(each).min() > 1e-8
        for found, keep in ((majority, np.sign(each).sum(0) > 0), (mean, each.sum(0) > 0)):
            expected = (left * (values * keep)) @ right
            np.testing.assert_allclose(found[path].reshape(rows, -1), expected, atol=1e-5, err_msg=path)
    bias = "block_0/attn/q/bias"
    assert np.all((majority[bias] == vector[bias]) | (majority[bias] == 0))


def test_heads_belong_to_the_side_that_they_are_on():
    shapes = {path: leaf.shape for path, leaf in flatten(draw(0)).items()}
    found = {path: matrix_shape(symmetry_of(), path, shape) for path, shape in shapes.items() if len(shape) > 1}
    assert found["block_0/attn/q/kernel"] == found["block_0/attn/out/kernel"] == (16, 16)
    assert found["block_0/attn/q/bias"] == (1, 16)
    assert found["patch/kernel"] == (16, 16)
    assert found["block_0/mlp/up/kernel"] == (16, 24)


def test_the_fine_tuned_source_stands_in_for_labels(bases, sample):
    source, finetuned, target = bases
    told = jax.nn.softmax(sample.forward(finetuned, sample.batch))
    prepared = prepare_gradfix_teacher(KEY, symmetry_of, *bases, sample=sample)
    unlabelled = prepare_gradfix_teacher(KEY, symmetry_of, *bases, sample=sample.without_labels())
    jax.tree.map(np.testing.assert_array_equal, prepared.task_vector, unlabelled.task_vector)
    vector = flatten(tree.task_vector(source, finetuned))
    assert_masked(prepared.task_vector, vector, loop_gradients(target, sample, np.asarray(told)))


def test_an_alignment_comes_first(bases, sample):
    """By labels where there are any, by the teacher where there are none."""
    full = prepare_full(KEY, symmetry_of, *bases)
    by_label = mask_prepared(full, symmetry_of, bases[2], sample, LabelLoss(sample.forward), Rule())
    found = prepare_align_then_mask(KEY, symmetry_of, *bases, sample=sample)
    jax.tree.map(np.testing.assert_array_equal, found.task_vector, by_label.task_vector)
    assert found.element is not None
    assert found.info["is_converged"] == full.info["is_converged"]
    taught = with_teacher(sample.without_labels(), bases[1])
    by_teacher = mask_prepared(full, symmetry_of, bases[2], taught, TeacherLoss(sample.forward), Rule())
    found = prepare_align_then_mask(KEY, symmetry_of, *bases, sample=sample.without_labels())
    jax.tree.map(np.testing.assert_array_equal, found.task_vector, by_teacher.task_vector)


def test_leaves_that_the_loss_does_not_reach_become_zero(bases, sample):
    extra = [
        {**params, "unused": np.full((3,), value, np.float32)} for params, value in zip(bases, (0, 1, 0), strict=True)
    ]
    blind = replace(sample, forward=Blind(sample.forward))
    votes = cast_votes(extra[2], blind, LabelLoss(blind.forward))
    np.testing.assert_array_equal(votes["unused"], 0)
    np.testing.assert_array_equal(Rule().weigh(extra[1]["unused"], votes["unused"], len(sample)), 0)


@dataclass(frozen=True)
class Blind:
    """A network that does not look at one of its leaves."""

    forward: object

    def __call__(self, params, batch):
        return self.forward({name: leaf for name, leaf in params.items() if name != "unused"}, batch)


def test_what_cannot_vote_is_refused(bases, sample):
    def prepare(sample=sample, **options):
        return prepare_gradfix(KEY, symmetry_of, *bases, sample=sample, **options)

    with pytest.raises(DataError, match=r"dots \(train\): the examples have no labels"):
        prepare(sample.without_labels())
    with pytest.raises(DataError, match="no examples"):
        prepare(sample.take([]))
    odd = replace(sample, batch={**sample.batch, "label": sample.batch["label"] + 1})
    with pytest.raises(DataError, match="labels 1 to 3, the network has 3 classes"):
        prepare(odd)
    with pytest.raises(DataError, match="'image' holds NaN"):
        prepare(replace(sample, batch={**sample.batch, "image": sample.batch["image"] * np.nan}))
    with pytest.raises(UnknownNameError, match="majority, mean"):
        prepare(vote="most")
    with pytest.raises(UnknownNameError, match="auto, full, none, permutation, transfusion"):
        prepare(align="theseus")
    with pytest.raises(ConfigError, match="a mean vote has none"):
        prepare(vote="mean", z=1.0)
    with pytest.raises(ConfigError, match="temperature is 0"):
        prepare_gradfix_teacher(KEY, symmetry_of, *bases, sample=sample, temperature=0.0)
