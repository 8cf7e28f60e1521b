"""What is held apart of a sample, class by class, and losses of single and of several predictions an example."""

import numpy as np
import pytest

from jaxtune.sample import Sample, example_losses


def of_labels(labels):
    labels = np.asarray(labels, np.int32)
    return Sample("rows", {"row": np.arange(len(labels)), "label": labels}, None)


@pytest.mark.parametrize(("fraction", "seed"), [(0.25, 0), (0.5, 0), (0.5, 7), (0.75, 3)])
def test_a_class_with_one_example_is_learned(fraction, seed):
    """It used to sort behind all others, so that the held share had the class and what was learned on had not."""
    rest, held = of_labels([0] * 99 + [1] + [2]).split(fraction, seed=seed)
    assert {1, 2} <= set(rest.batch["label"].tolist())
    assert set(held.batch["label"].tolist()) == {0}
    assert len(held) == round(fraction * 101)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_every_class_gives_its_share(fraction):
    sizes = {0: 40, 1: 8, 2: 4}
    _, held = of_labels(np.repeat(list(sizes), list(sizes.values()))).split(fraction, seed=2)
    assert {label: int((held.batch["label"] == label).sum()) for label in sizes} == {
        label: round(fraction * size) for label, size in sizes.items()
    }


def test_examples_that_are_all_alone_are_still_split():
    rest, held = of_labels(np.arange(8)).split(0.25)
    assert (len(rest), len(held)) == (6, 2)
    assert sorted([*rest.batch["row"], *held.batch["row"]]) == list(range(8))


def test_without_classes_labels_change_no_split_and_stay():
    sample = of_labels(np.arange(40) % 3)
    plain, blind = sample.without_labels().split(0.25, seed=0), sample.split(0.25, seed=0, by_class=False)
    for one, other in zip(plain, blind, strict=True):
        np.testing.assert_array_equal(one.batch["row"], other.batch["row"])
        np.testing.assert_array_equal(other.batch["label"], other.batch["row"] % 3)
    assert sample.split(0.25, seed=0)[1].batch["row"].tolist() != blind[1].batch["row"].tolist()


@pytest.mark.parametrize("has_padding", [False, True])
def test_smoothed_losses_are_those_of_a_loop(has_padding):
    draw = np.random.default_rng(0)
    logits, label = draw.normal(size=(4, 3, 5)).astype(np.float32), draw.integers(0, 5, (4, 3))
    valid = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]], bool) if has_padding else np.ones((4, 3), bool)
    logs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    expected = [
        np.mean([-(0.8 * p[y] + 0.2 * p.mean()) for p, y, ok in rows if ok]) if any(ok for *_, ok in rows) else 0.0
        for rows in ([*zip(*one, strict=True)] for one in zip(logs, label, valid, strict=True))
    ]
    batch = {"label": label, **({"valid": valid} if has_padding else {})}
    np.testing.assert_allclose(example_losses(logits, batch, label_smoothing=0.2), expected, rtol=1e-5)
    single = example_losses(logits[:, 0], {"label": label[:, 0]}, label_smoothing=0.2)
    np.testing.assert_allclose(
        single, [-(0.8 * p[0][y] + 0.2 * p[0].mean()) for p, y in zip(logs, label[:, 0], strict=True)], 1e-5
    )


@pytest.mark.parametrize("labels", [np.arange(20) % 3, np.zeros(20, int)], ids=("classes", "one class"))
def test_turns_draw_other_examples_until_all_were_drawn(labels):
    sample = of_labels(labels)
    drawn = [sample.split(0.2, seed=5, turn=turn) for turn in range(5)]
    for rest, held in drawn:
        assert sorted([*rest.batch["row"], *held.batch["row"]]) == list(range(20))
    assert sorted(row for _, held in drawn for row in held.batch["row"]) == list(range(20))
    first = sample.split(0.2, seed=5)[1].batch["row"].tolist()
    assert drawn[0][1].batch["row"].tolist() == first
