"""Numbers about models against loops over single examples in NumPy."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from small_models import CONFIGS, random_params, run
from toy_tasks import Linear, draw, make_base, make_task, make_vectors, softmax

from jaxtune.errors import ConfigError, DataError, NonFiniteError, UnknownNameError
from jaxtune.evaluate.candidates import one_candidate, stack_candidates
from jaxtune.evaluate.classifier import balanced_accuracy, evaluate_classifier
from jaxtune.evaluate.flips import count_flips, measure_flips
from jaxtune.evaluate.language import evaluate_texts
from jaxtune.evaluate.line import evaluate_line
from jaxtune.evaluate.many import evaluate_many
from jaxtune.evaluate.tasks import normalise_tasks
from jaxtune.evaluate.wise_ft import trace_wise_ft
from jaxtune.evaluate.zero_shot import zero_shot_embeddings
from jaxtune.sample import Sample
from jaxtune.sampling import Forward, Frozen

BASE = make_base()
OTHER, THIRD = (jax.tree.map(lambda b, v: b + v, BASE, vector) for vector in make_vectors(2, scale=1.0))


def shifted_task(seed=0):
    """A task whose labels no model knows fully: those of a model between the others, on noisy inputs."""
    middle = jax.tree.map(lambda a, b: (a + b) / 2, OTHER, THIRD)
    sample = make_task(middle, seed=seed)
    noisy = sample.batch["image"] + draw(*sample.batch["image"].shape, seed=seed + 50, scale=0.5)
    return Sample("noisy", {"image": noisy, "label": sample.batch["label"]}, Linear())


def logits_of(params, sample):
    hidden = np.tanh(sample.batch["image"] @ params["block_0"]["kernel"] + params["block_0"]["bias"])
    return (hidden @ params["block_1"]["kernel"]).astype(np.float64)


def right(params, sample):
    return logits_of(params, sample).argmax(-1) == sample.batch["label"]


def test_balanced_accuracy_weighs_classes_not_examples():
    labels = np.array([0, 0, 0, 0, 7, 7, 2])
    is_correct = np.array([True, True, True, False, True, False, False])
    assert balanced_accuracy(is_correct, labels) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    sample = shifted_task()
    found = evaluate_many(one_candidate(OTHER), sample.forward, sample)[0]
    each = [right(OTHER, sample)[sample.batch["label"] == c].mean() for c in np.unique(sample.batch["label"])]
    assert found.balanced_accuracy == pytest.approx(np.mean(each))
    assert found.balanced_accuracy != found.accuracy


def test_flips_equal_a_count_and_differ_by_the_accuracy():
    sample = shifted_task()
    found = measure_flips(BASE, stack_candidates([OTHER, BASE]), sample)
    old, new = right(BASE, sample), right(OTHER, sample)
    assert found[0].negative == sum(a and not b for a, b in zip(old, new, strict=True)) / len(sample) > 0
    assert found[0].positive == sum(b and not a for a, b in zip(old, new, strict=True)) / len(sample) > 0
    assert found[0].positive - found[0].negative == pytest.approx(new.mean() - old.mean())
    assert (found[1].negative, found[1].positive) == (0, 0)
    with pytest.raises(DataError, match="same examples"):
        count_flips(np.ones(3), np.ones(4))


@dataclass(frozen=True)
class Bigram:
    """Logits of the next token from a table alone."""

    def __call__(self, params, batch):
        return params["table"][batch["text"][:, :-1]]


def texts(lengths=(6, 2, 4, 1, 6), size=6, vocabulary=5):
    text = np.random.RandomState(0).randint(0, vocabulary, (len(lengths), size)).astype(np.int32)
    mask = np.arange(size)[None] < np.array(lengths)[:, None]
    batch = {"text": text, "mask": mask, "label": text[:, 1:], "valid": mask[:, 1:] & mask[:, :-1]}
    return Sample("texts", batch, Bigram())


@pytest.mark.parametrize("batch_size", [None, 2])
def test_perplexity_counts_tokens_and_no_padding(batch_size):
    tables = [draw(5, 5, seed=seed) for seed in (1, 2)]
    sample = texts()
    found = evaluate_texts(stack_candidates([{"table": t} for t in tables]), sample, batch_size=batch_size)
    for table, one in zip(tables, found, strict=True):
        losses, hits = [], []
        for text, mask in zip(sample.batch["text"], sample.batch["mask"], strict=True):
            for before, after, real in zip(text, text[1:], mask[1:], strict=False):
                if real:
                    losses.append(-np.log(softmax(table[before].astype(np.float64))[after]))
                    hits.append(table[before].argmax() == after)
        assert one.num_tokens == len(losses) == 5 + 1 + 3 + 0 + 5
        assert one.loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert one.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
        assert one.accuracy == np.mean(hits)


def test_texts_that_cannot_be_measured_are_refused():
    model = one_candidate({"table": draw(5, 5, seed=1)})
    with pytest.raises(DataError, match="every token is padding"):
        evaluate_texts(model, texts(lengths=(1, 1)))
    with pytest.raises(DataError, match="no tokens to foretell"):
        evaluate_texts(model, texts().without_labels())
    with pytest.raises(NonFiniteError, match="model 0 are NaN, first for text 0"):
        evaluate_texts(one_candidate({"table": np.full((5, 5), np.nan, np.float32)}), texts())
    with pytest.raises(DataError, match=r"texts: expected one label an example, got labels \[5, 5\]"):
        evaluate_many(model, texts().forward, texts())
    with pytest.raises(DataError, match="texts: expected one label an example"):
        measure_flips(model.take(0), model, texts())
    with pytest.raises(DataError, match="texts: expected one label an example"):
        trace_wise_ft(model.take(0), model.take(0), {"test": texts()})
    with pytest.raises(DataError, match="noisy: the examples have no labels"):
        measure_flips(BASE, one_candidate(OTHER), shifted_task().without_labels())
    uniform = evaluate_texts(one_candidate({"table": np.zeros((5, 5), np.float32)}), texts())[0]
    assert uniform.perplexity == pytest.approx(5)


def test_a_line_has_its_worst_point_and_both_ends():
    sample = shifted_task()
    line = evaluate_line(OTHER, THIRD, sample)
    assert len(line.metrics) == 25
    losses = []
    for weight in np.linspace(0, 1, 25):
        params = jax.tree.map(lambda a, b, w=weight: (1 - w) * a + w * b, OTHER, THIRD)
        probabilities = softmax(logits_of(params, sample))
        losses.append(-np.log(probabilities[np.arange(len(sample)), sample.batch["label"]]).mean())
    np.testing.assert_allclose(line.barrier.losses, losses, rtol=1e-4)
    assert line.end_losses == (line.barrier.losses[0], line.barrier.losses[-1])
    excess = np.array(losses) - np.linspace(losses[0], losses[-1], 25)
    assert line.barrier.height == pytest.approx(max(excess.max(), 0), abs=1e-4)
    tables = [{"table": draw(5, 5, seed=seed)} for seed in (1, 2)]
    of_texts = evaluate_line(*tables, texts(), num_points=3)
    middle = {"table": (tables[0]["table"] + tables[1]["table"]) / 2}
    assert of_texts.barrier.losses[1] == pytest.approx(evaluate_texts(one_candidate(middle), texts())[0].loss, rel=1e-6)
    with pytest.raises(ConfigError, match="num_points is 2"):
        evaluate_line(OTHER, THIRD, sample, num_points=2)
    with pytest.raises(DataError, match="a loss needs labelled examples, and here are none"):
        evaluate_line(OTHER, THIRD, sample.without_labels())


def test_tasks_are_normalised_in_both_ways():
    found = normalise_tasks({"a": 0.5, "b": 0.9}, {"b": 0.9, "a": 0.8})
    assert found.mean == pytest.approx(0.7)
    assert found.mean_of_ratios == pytest.approx((0.625 + 1) / 2)
    assert found.ratio_of_means == pytest.approx(0.7 / 0.85)
    with pytest.raises(ConfigError, match="not of the same tasks: c"):
        normalise_tasks({"a": 1.0, "c": 1.0}, {"a": 1.0})
    with pytest.raises(ConfigError, match="there are none"):
        normalise_tasks({}, {})
    with pytest.raises(ConfigError, match="reference of 0"):
        normalise_tasks({"a": 1.0}, {"a": 0.0})


@pytest.mark.parametrize("renormalise", [True, False])
def test_zero_shot_read_out_gives_clips_own_logits(renormalise):
    """One template: the loss is that of CLIP's own softmax over texts, temperature and all."""
    config = CONFIGS["clip"]
    params = random_params(config, dtype=np.float32)
    params["logit_scale"] = np.float32(1.3)
    names, templates = ["cat", "dog", "owl"], ["a photo of a {}.", "a {}"]

    def tokenize(lines):
        rows = [[1 + ord(letter) % 29 for letter in line[-4:] + line[:4]] + [30] for line in lines]
        return np.array(rows, np.int32)

    embeddings = zero_shot_embeddings(config, params, names, templates, tokenize, renormalise=renormalise)
    image = draw(4, 8, 8, 3, seed=1)
    outputs = run(config, params, {"image": image})
    features = []
    for template in templates:
        text = run(config, params, {"text": tokenize([template.format(name) for name in names])})
        features.append(np.asarray(text["text_features"]))
    rows = np.mean(features, axis=0)
    if renormalise:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.exp(1.3) * np.asarray(outputs["image_features"]) @ rows.T
    label = np.array([0, 1, 2, 1], np.int32)
    sample = Sample("images", {"image": image, "label": label}, Forward(config, Frozen(embeddings)))
    logits = jax.jit(sample.forward)(params, sample.batch)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    loss = -np.log(softmax(expected)[np.arange(4), label]).mean()
    assert evaluate_many(one_candidate(params), sample.forward, sample)[0].loss == pytest.approx(loss, rel=1e-5)

    class Records:
        def __len__(self):
            return 4

        def __getitems__(self, indices):
            return {name: values[indices] for name, values in sample.batch.items()}

    assert evaluate_classifier(config, params, Records(), embeddings=embeddings).loss == pytest.approx(loss, rel=1e-5)


def test_wise_ft_curve_equals_a_loop():
    inside, outside = make_task(OTHER), shifted_task()
    curve = trace_wise_ft(BASE, OTHER, {"inside": inside, "outside": outside}, alphas=(-0.5, 0.0, 0.4, 1.0))
    assert curve.is_outside == (True, False, False, False)
    for sample, found in ((inside, curve.splits["inside"]), (outside, curve.splits["outside"])):
        ends = right(BASE, sample), right(OTHER, sample)
        for n, alpha in enumerate(curve.alphas):
            params = jax.tree.map(lambda a, b, w=alpha: (1 - w) * a + w * b, BASE, OTHER)
            now = right(params, sample)
            assert found.accuracies[n] == now.mean()
            assert found.both_wrong[n] == (now & ~ends[0] & ~ends[1]).mean()
            assert found.both_right[n] == (~now & ends[0] & ends[1]).mean()
        confidence = [softmax(logits_of(end, sample)).max(-1).mean() for end in (BASE, OTHER)]
        np.testing.assert_allclose(found.confidence, confidence, rtol=1e-5)
        assert [end.accuracy for end in found.ends] == [one.mean() for one in ends]
    assert max(curve.splits["outside"].both_wrong) > 0
    assert curve.choose("inside") == 1.0
    with pytest.raises(UnknownNameError, match="inside, outside"):
        curve.choose("validation")
    with pytest.raises(ConfigError, match="no sample"):
        trace_wise_ft(BASE, OTHER, {})
    with pytest.raises(ConfigError, match="must be finite"):
        trace_wise_ft(BASE, OTHER, {"inside": inside}, alphas=[np.nan])
