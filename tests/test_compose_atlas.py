"""aTLAS beside loops in NumPy, in all its forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_tasks import Linear, add, draw, forward64, make_base, make_task, make_vectors, minimise, softmax, wide

from jaxtune.compose import objectives
from jaxtune.compose.partition import draw_parts
from jaxtune.compose.registry import compose
from jaxtune.compose.vectors import stack_vectors
from jaxtune.errors import ConfigError, DataError, UnknownNameError

PATHS = ("block_0/bias", "block_0/kernel", "block_1/kernel")
BASE = make_base()
VECTORS = make_vectors(2)
EXPERTS = [add(BASE, [vector], [1.0]) for vector in VECTORS]
SAMPLES = [make_task(expert, seed=n, name=f"task {n}") for n, expert in enumerate(EXPERTS)]


def combine64(numbers):
    """Base and weighted vectors by a loop; numbers: [T, leaves]."""
    params = wide(BASE)
    for vector, c in zip(map(wide, VECTORS), numbers, strict=True):
        for n, path in enumerate(PATHS):
            block, name = path.split("/")
            params[block][name] = params[block][name] + c[n] * vector[block][name]
    return params


def cross_entropy64(params, sample):
    p = softmax(forward64(params, sample.batch["image"]))
    return -np.log(p[np.arange(len(p)), sample.batch["label"]]).mean()


def accuracy(params, sample):
    return float((np.asarray(Linear()(params, sample.batch)).argmax(-1) == sample.batch["label"]).mean())


def as_array(coefficients):
    return np.stack([coefficients[path] for path in PATHS], axis=1)


@pytest.mark.parametrize("penalty", [None, 1, 2])
def test_addition_takes_the_steps_of_a_loop_in_numpy(penalty):
    """Every epoch is one step over everything here; the accuracies choose among the start and three epochs."""
    how = {"num_epochs": 3, "learning_rate": 0.1, "batch_size": 120, "validation": 0.0, "penalty": penalty}
    found = compose("atlas", BASE, EXPERTS, SAMPLES, start=0.1, **how)

    def loss(c):
        total = sum(cross_entropy64(combine64(c), sample) for sample in SAMPLES)
        return total + (0.5 * np.mean([np.linalg.norm(c[:, n], penalty) for n in range(3)]) if penalty else 0.0)

    rounds = [minimise(loss, np.full((2, 3), 0.1), n, 0.1, decay=0.1, clip=1.0) for n in range(4)]
    best = [accuracy(expert, sample) for expert, sample in zip(EXPERTS, SAMPLES, strict=True)]
    scores = [
        np.mean([accuracy(combine64(c), s) / b for s, b in zip(SAMPLES, best, strict=True)]) for c in rounds
    ]  # fmt: skip
    np.testing.assert_allclose(found.info["score"], scores, atol=1e-6)
    np.testing.assert_allclose(as_array(found.coefficients), rounds[int(np.argmax(scores))], atol=3e-5)
    assert found.info["step"] == np.argmax(scores) > 0


def test_addition_learns_what_single_fine_tunes_do_not_know():
    found = compose("atlas", BASE, EXPERTS, SAMPLES, num_epochs=60, learning_rate=0.05, start=0.3)
    start, learned = ([one["accuracy"] for one in found.info["validation"][w]] for w in ("start", "learned"))
    assert np.mean(learned) > np.mean(start)


def test_labels_of_a_planted_mixture_lead_to_it():
    """Soft enough labels of a network inside the space: its cross-entropy has its minimum there."""
    planted = np.array([[0.8, 0.3, 0.6], [0.1, 0.7, -0.4]])
    image = draw(200, 6, seed=7)
    p = softmax(forward64(combine64(planted), image))
    label = np.array([np.random.RandomState(n).choice(3, p=row) for n, row in enumerate(np.repeat(p, 20, axis=0))])
    sample = dataclasses.replace(
        SAMPLES[0], batch={"image": np.repeat(image, 20, axis=0), "label": label.astype(np.int32)}
    )
    found = compose("atlas_few_shot", BASE, EXPERTS, sample, batch_size=4000, num_epochs=20, weight_decay=0.0)
    np.testing.assert_allclose(as_array(found.coefficients), planted, atol=0.15)  # 4000 labels say no more


def test_negation_loses_the_task_and_keeps_the_control():
    base = add(BASE, VECTORS, [0.5, 0.5])
    tuned = [add(base, [vector], [1.0]) for vector in VECTORS]
    samples = [make_task(base, seed=n, size=200, name=f"task {n}") for n in range(2)]
    target = dataclasses.replace(samples[0], batch={**samples[0].batch, "image": np.abs(samples[0].batch["image"])})
    target.batch["label"] = np.asarray(Linear()(base, target.batch)).argmax(-1).astype(np.int32)
    found = compose("atlas_negation", base, tuned, [target, samples[1]], learning_rate=0.02, validation=0.5)
    start, learned = found.info["validation"]["start"], found.info["validation"]["learned"]
    assert learned[0]["accuracy"] < start[0]["accuracy"]
    assert learned[1]["accuracy"] >= 0.95 * start[1]["accuracy"]
    free = compose(
        "atlas_negation", base, tuned, [target, samples[1]], learning_rate=0.02, validation=0.5, control=0.0
    )  # fmt: skip
    assert free.info["validation"]["learned"][0]["accuracy"] <= learned[0]["accuracy"]
    assert len(free.info["loss"]) >= len(found.info["loss"])


def test_negation_takes_steps_up_the_first_loss():
    found = compose(
        "atlas_negation", BASE, EXPERTS, SAMPLES, num_epochs=2, learning_rate=0.1, batch_size=120, validation=0.0,
        control=0.0,
    )  # fmt: skip

    def loss(c):
        return cross_entropy64(combine64(c), SAMPLES[1]) - cross_entropy64(combine64(c), SAMPLES[0])

    rounds = [minimise(loss, np.zeros((2, 3)), n, 0.1, decay=0.1, clip=1.0) for n in range(3)]
    scores = [-accuracy(combine64(c), SAMPLES[0]) for c in rounds]
    np.testing.assert_allclose(as_array(found.coefficients), rounds[int(np.argmax(scores))], atol=3e-5)


def test_few_shots_take_ten_steps_an_epoch_along_a_cosine():
    few = SAMPLES[0].take(np.arange(12))
    found = compose("atlas_few_shot", BASE, EXPERTS[1:], few, num_epochs=1)
    assert len(found.info["loss"]) == 10

    def loss(c):
        return cross_entropy64(combine64(np.concatenate([np.zeros((1, 3)), c])), few)

    expected = minimise(loss, np.zeros((1, 3)), 10, 0.1, decay=0.1, clip=1.0, is_cosine=True)
    np.testing.assert_allclose(as_array(found.coefficients), expected, atol=1e-4)


def test_pseudo_labels_of_a_batch_by_hand():
    logits = np.array([[9.0, 0, 0], [0, 0.1, 0], [0, 0, 7], [0.2, 0, 0]], np.float32)
    batch = {"logits": logits, "trusted": np.array([-1, -1, 0, 1], np.int32)}
    found = objectives.PseudoLabels(0.9)(lambda params, batch: params["scale"] * batch["logits"], {"scale": 1.0}, batch)
    p = softmax(logits.astype(np.float64))
    # The first is believed, the second is not; the third is trusted against what the network says, as is the fourth.
    expected = -(np.log(p[0, 0]) + np.log(p[2, 0]) + np.log(p[3, 1])) / 4
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_other_view_learns_the_label_of_the_first():
    batch = {"logits": np.array([[9.0, 0, 0]], np.float32), "trusted": np.array([-1], np.int32)}
    flip = objectives.PseudoLabels(0.9, lambda batch: {"logits": batch["logits"][:, ::-1]})
    found = flip(lambda params, batch: jnp.asarray(batch["logits"]), {}, batch)
    assert float(found) == pytest.approx(9 + np.log(1 + 2 * np.exp(-9.0)), rel=1e-5)


def test_trusted_are_the_surest_of_every_class_and_no_others():
    sample = make_task(EXPERTS[0], size=90)
    p = softmax(forward64(wide(EXPERTS[0]), sample.batch["image"]))
    trusted = objectives.trust(sample, EXPERTS[0]).batch["trusted"]
    for label in range(3):
        rows = np.flatnonzero(p.argmax(-1) == label)
        surest = rows[np.argsort(-p.max(-1)[rows])][: 90 // 30]
        assert set(np.flatnonzero(trusted == label)) == set(surest)
    assert (trusted >= 0).sum() == 9
    assert (objectives.trust(sample, EXPERTS[0], num_per_class=1).batch["trusted"] >= 0).sum() == 3


def test_test_time_needs_no_labels_and_reports_with_them():
    # A network that is nearly right about most inputs, and vectors that make it right.
    found = compose("atlas_test_time", BASE, EXPERTS, SAMPLES[0], start=0.5, num_epochs=2, threshold=0.8)
    without = compose(
        "atlas_test_time", BASE, EXPERTS,
        [SAMPLES[0].without_labels().split(0.25)[0]], start=0.5, num_epochs=2, threshold=0.8, validation=0.0,
    )  # fmt: skip
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found.coefficients, without.coefficients)
    assert "accuracy" in found.info["validation"]["learned"][0]
    entropy = compose("atlas_test_time", BASE, EXPERTS, SAMPLES[0], objective="entropy", num_epochs=2)
    one = entropy.info["validation"]
    assert one["learned"][0]["entropy"] < one["start"][0]["entropy"]


def test_a_partition_gives_every_entry_the_coefficient_of_its_share():
    found = compose("atlas", BASE, EXPERTS, SAMPLES, partition=4, num_epochs=2, learning_rate=0.1)
    parts = draw_parts(stack_vectors(BASE, EXPERTS)["vectors"], 4, 0)
    assert parts.keys() == {"block_0/kernel", "block_1/kernel"}
    for path, part in parts.items():
        counts = np.bincount(part.ravel(), minlength=4)
        assert counts.max() - counts.min() <= 1
        block, name = path.split("/")
        expected = BASE[block][name].copy()
        for where in np.ndindex(part.shape):
            for vector, c in zip(VECTORS, found.coefficients[path], strict=True):
                expected[where] += c[part[where]] * vector[block][name][where]
        np.testing.assert_allclose(found.params[block][name], expected, atol=1e-5)
    assert found.coefficients["block_0/bias"].shape == (2,)
    assert found.coefficients["block_1/kernel"].shape == (2, 4)


def test_one_share_is_no_partition():
    one = compose("atlas", BASE, EXPERTS, SAMPLES, num_epochs=1)
    other = compose("atlas", BASE, EXPERTS, SAMPLES, num_epochs=1, partition=1, seed=0)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(DataError, match="task 1: the examples have no labels"):
        compose("atlas", BASE, EXPERTS, [SAMPLES[0], SAMPLES[1].without_labels()])
    with pytest.raises(ConfigError, match="takes one sample for all models, got 2"):
        compose("atlas_few_shot", BASE, EXPERTS, SAMPLES)
    with pytest.raises(ConfigError, match="two samples, the task to lose and a control; got 1"):
        compose("atlas_negation", BASE, EXPERTS, SAMPLES[:1])
    with pytest.raises(ConfigError, match="partition is 0"):
        compose("atlas", BASE, EXPERTS, SAMPLES, partition=0)
    with pytest.raises(ConfigError, match="penalty is 3"):
        compose("atlas", BASE, EXPERTS, SAMPLES, penalty=3)
    with pytest.raises(UnknownNameError, match="Known: entropy, pseudo_labels"):
        compose("atlas_test_time", BASE, EXPERTS, SAMPLES[0], objective="pseudo")
