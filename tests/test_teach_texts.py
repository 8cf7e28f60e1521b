"""On-policy distillation, inputs that a filter accepts, and proxy logits: each beside a plain loop."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kills import kill_behind

from jaxtune.errors import ConfigError, DataError, UnknownNameError
from jaxtune.evaluate.proxy import with_proxy
from jaxtune.gradients import predict
from jaxtune.sample import Sample
from jaxtune.teach.accepted import accept_inputs
from jaxtune.teach.on_policy import ForwardLoss, ReverseLoss, continue_texts, distill_on_policy
from jaxtune.train.checkpoints import StateSeries

VOCABULARY, LENGTH = 7, 6
KEY = jax.random.key(0)


def next_token(params, batch):
    """A causal language model: the mean of all tokens so far, beside the last one."""
    embedded = params["embed"][batch["text"]]
    counts = jnp.arange(1, embedded.shape[1] + 1, dtype=jnp.float32)[None, :, None]
    hidden = jnp.tanh(embedded + jnp.cumsum(embedded, axis=1) / counts)
    return (hidden @ params["head"])[:, :-1]


def draw_params(seed, scale=1.0):
    draw = np.random.default_rng(seed)
    shapes = {"embed": (VOCABULARY, 8), "head": (8, VOCABULARY)}
    return {name: (scale * draw.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def prompts():
    text = np.random.default_rng(1).integers(0, VOCABULARY, (12, LENGTH)).astype(np.int32)
    valid = np.ones((12, LENGTH - 1), bool)
    return Sample(
        "prompts", {"text": text, "mask": np.ones(text.shape, bool), "label": text[:, 1:], "valid": valid}, next_token
    )


def test_greedy_writing_is_the_first_token_again_and_again(prompts):
    params = draw_params(0)
    written = continue_texts(KEY, prompts, params, prompt_length=2, temperature=0.0)
    for before, after in zip(prompts.batch["text"], written.batch["text"], strict=True):
        text = list(before[:2])
        while len(text) < LENGTH:
            padded = np.array([*text, *[0] * (LENGTH - len(text))])[None]
            text.append(int(np.argmax(next_token(params, {"text": padded})[0, len(text) - 1])))
        np.testing.assert_array_equal(after, text)
    np.testing.assert_array_equal(written.batch["valid"], [[False, True, True, True, True]] * 12)
    np.testing.assert_array_equal(written.batch["label"], written.batch["text"][:, 1:])


def test_drawn_tokens_follow_the_networks_probabilities(prompts):
    params = draw_params(0)
    many = prompts.take([3] * 4000)
    first = continue_texts(KEY, many, params, prompt_length=5).batch["text"]
    np.testing.assert_array_equal(first[:, :5], many.batch["text"][:, :5])
    expected = jax.nn.softmax(next_token(params, prompts.take([3]).batch)[0, 4])
    np.testing.assert_allclose(np.bincount(first[:, 5], minlength=VOCABULARY) / 4000, expected, atol=0.03)
    again = continue_texts(KEY, many, params, prompt_length=5).batch["text"]
    np.testing.assert_array_equal(first, again)


def test_both_directions_by_hand(prompts):
    teacher, student = draw_params(0), draw_params(1)
    batch = {**prompts.batch, "teacher": predict(prompts, teacher)}
    batch["valid"] = np.arange(LENGTH - 1)[None] >= np.arange(12)[:, None] % 4
    theirs, ours = (np.asarray(jax.nn.log_softmax(predict(prompts, p)), np.float64) for p in (teacher, student))
    for loss, kl in (
        (ForwardLoss(next_token), (np.exp(theirs) * (theirs - ours)).sum(-1)),
        (ReverseLoss(next_token), (np.exp(ours) * (ours - theirs)).sum(-1)),
    ):
        expected = [row[valid].mean() for row, valid in zip(kl, batch["valid"], strict=True)]
        np.testing.assert_allclose(loss(student, batch), expected, rtol=1e-4)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_student_comes_to_write_as_the_teacher(direction, prompts):
    teacher, student = draw_params(0), draw_params(1)
    how = {"prompt_length": 2, "num_rounds": 12, "steps_per_round": 10, "learning_rate": 0.03, "direction": direction}
    found = distill_on_policy(prompts, teacher, student, key=KEY, **how)
    divergences = found.info["divergences"]
    assert len(divergences) == 12
    assert np.mean(divergences[-3:]) < 0.4 * divergences[0]
    again = distill_on_policy(prompts, teacher, student, key=KEY, **how)
    jax.tree.map(np.testing.assert_array_equal, found.params, again.params)
    assert again.info == found.info


def test_a_killed_student_goes_on_bit_for_bit(prompts, tmp_path):
    how = {"key": KEY, "prompt_length": 2, "num_rounds": 4, "steps_per_round": 10, "learning_rate": 0.03}
    teacher, student = draw_params(1), draw_params(2, 0.3)
    whole = distill_on_policy(prompts, teacher, student, **how)

    def run(**others):
        with StateSeries(tmp_path / "states") as series:
            first = series.latest_step
            return distill_on_policy(prompts, teacher, student, series=series, **how | others), first

    kill_behind(1, run)
    kill_behind(2, run)
    found, first = run()
    assert first == 3
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    assert found.info == whole.info
    with pytest.raises(ConfigError, match=r"of a run with temperature 1\.0; this one has temperature 0\.5"):
        run(temperature=0.5)


def test_what_cannot_be_written_is_refused(prompts):
    params = draw_params(0)

    def run(sample=prompts, **options):
        return distill_on_policy(sample, params, params, **{"prompt_length": 2, **options})

    with pytest.raises(DataError, match="texts of 6 tokens leave nothing to write behind 6"):
        run(prompt_length=6)
    mask = prompts.batch["mask"].copy()
    mask[0, 1] = False
    with pytest.raises(DataError, match="shorter than prompt_length"):
        run(replace(prompts, batch={**prompts.batch, "mask": mask}))
    with pytest.raises(DataError, match="texts for a language model"):
        run(Sample("pictures", {"image": np.zeros((2, 3), np.float32)}, next_token))
    with pytest.raises(UnknownNameError, match="forward, reverse"):
        run(direction="both")
    with pytest.raises(ConfigError, match="num_rounds 0"):
        run(num_rounds=0)


def is_bright(batch):
    return batch["image"][:, 0] > 0.5


def pictures(seed, count=40):
    return Sample("pictures", {"image": np.random.default_rng(seed).random((count, 3), np.float32)}, next_token)


def test_the_first_accepted_are_taken_in_order():
    sample = pictures(0)
    rows = np.flatnonzero(sample.batch["image"][:, 0] > 0.5)
    found = accept_inputs(sample, is_bright, 11, chunk_size=7)
    np.testing.assert_array_equal(found.batch["image"], sample.batch["image"][rows[:11]])
    assert found.forward is sample.forward


def test_candidates_are_made_as_long_as_too_few_are_accepted():
    made = []

    def make():
        for seed in itertools.count():
            made.append(pictures(seed))
            yield made[-1]

    found = accept_inputs(make(), is_bright, 50)
    assert len(found) == 50
    assert len(made) in (3, 4)
    everything = np.concatenate([one.batch["image"] for one in made])
    np.testing.assert_array_equal(found.batch["image"], everything[everything[:, 0] > 0.5][:50])


def test_too_few_accepted_stop_with_their_number():
    sample = pictures(0)
    num_bright = int((sample.batch["image"][:, 0] > 0.5).sum())
    with pytest.raises(DataError, match=f"pictures: {num_bright} of 40 candidates were accepted, 41 are wanted"):
        accept_inputs(sample, is_bright, 41)
    with pytest.raises(DataError, match="0 of 100 candidates"):
        accept_inputs((pictures(seed) for seed in itertools.count()), lambda b: is_bright(b) & False, 1,
                      max_candidates=100)  # fmt: skip
    with pytest.raises(DataError, match="expected one bool each"):
        accept_inputs(sample, lambda batch: batch["image"][:, 0], 3)
    with pytest.raises(ConfigError, match="count is 0"):
        accept_inputs(sample, is_bright, 0)


def test_proxy_logits_add_what_fine_tuning_did(prompts):
    source, finetuned, target = (draw_params(seed) for seed in range(3))
    sample, three = with_proxy(prompts, source, finetuned, target, scale=0.5)
    a, tuned, b = (predict(prompts, params) for params in (source, finetuned, target))
    np.testing.assert_allclose(predict(sample, three), b + 0.5 * (tuned - a), atol=1e-5)
    sample, three = with_proxy(prompts, source, finetuned, source)
    np.testing.assert_allclose(predict(sample, three), tuned, atol=1e-5)
    assert hash(sample.forward) == hash(with_proxy(prompts, target, source, source)[0].forward)
    with pytest.raises(ConfigError, match="scale is nan"):
        with_proxy(prompts, source, finetuned, target, scale=float("nan"))
