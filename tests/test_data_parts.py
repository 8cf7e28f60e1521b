"""Sources made of others: what they hold, and what they refuse."""

import numpy as np
import pytest

from jaxtune.data import ArraySource, JoinedSource, PartSource, take_few, take_half, take_sample
from jaxtune.errors import DataError


def source(name, num, num_classes, *, side=4, split="train"):
    images = np.arange(num, dtype=np.uint8)[:, None, None] * np.ones((1, side, side), np.uint8)
    return ArraySource(name, split, images, np.arange(num) % num_classes, [f"{name}/{c}" for c in range(num_classes)])


def pixels(batch):
    return np.round(batch["image"][:, 0, 0, 0] * 255).astype(int)


def test_joined_sources_keep_their_records_and_get_labels_of_their_own():
    joined = JoinedSource([source("a", 5, 2), source("b", 4, 3)])
    assert len(joined) == 9
    assert joined.class_names == ("a/0", "a/1", "b/0", "b/1", "b/2")
    batch = joined.__getitems__([8, 0, 5, 4, 4])
    np.testing.assert_array_equal(pixels(batch), [3, 0, 0, 4, 4])
    np.testing.assert_array_equal(batch["label"], [2, 0, 2, 0, 0])
    assert batch["label"].dtype == np.int32
    assert batch["image"].dtype == np.float32
    one = joined[5]
    assert one["label"] == 2
    assert one["image"].shape == (4, 4, 1)
    with pytest.raises(IndexError):
        joined[9]


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(DataError, match="class_prefix"):
        JoinedSource([source("a", 5, 2), source("a", 5, 2)])
    with pytest.raises(DataError, match="one split"):
        JoinedSource([source("a", 5, 2), source("b", 5, 2, split="test")])
    with pytest.raises(DataError, match="one split"):
        JoinedSource([])
    with pytest.raises(DataError, match="one size"):
        JoinedSource([source("a", 5, 2), source("b", 5, 2, side=5)]).__getitems__([0, 5])


@pytest.mark.parametrize("num", [2, 7, 8])
def test_the_halves_share_nothing_and_are_everything(num):
    whole = source("a", num, 2)
    first, second = (pixels(take_half(whole, n).__getitems__(range(len(take_half(whole, n))))) for n in (0, 1))
    assert len(first) - len(second) in (0, 1)
    np.testing.assert_array_equal(np.sort([*first, *second]), np.arange(num))
    with pytest.raises(DataError, match="0 or 1"):
        take_half(whole, 2)


def test_few_take_so_many_of_every_class_that_has_them():
    whole = source("a", 11, 4)
    few = take_few(whole, 3)
    labels = few.__getitems__(range(len(few)))["label"]
    np.testing.assert_array_equal(np.bincount(labels), [3, 3, 3, 2])
    other = take_few(whole, 1, seed=1)
    assert len(other) == 4
    assert other.class_names == whole.class_names
    assert len({tuple(pixels(take_few(whole, 1, seed=s).__getitems__(range(4)))) for s in range(9)}) > 3
    with pytest.raises(DataError, match="at least 1"):
        take_few(whole, 0)


def test_a_sample_is_drawn_over_the_whole_source():
    whole = source("a", 200, 2)
    sample = take_sample(whole, 50)
    seen = pixels(sample.__getitems__(range(50)))
    assert len(set(seen)) == 50
    assert seen.max() > 150
    assert take_sample(whole, 200) is whole
    with pytest.raises(DataError, match="no record is left"):
        PartSource(whole, [], name="nothing")
