"""The exact element at a rank, found without sorting everything."""

import numpy as np
import pytest

from jaxtune.merge.arrays import rank_values
from jaxtune.stream import order


def search(values, count, length=1000, group=3):
    runs = [(low, min(low + length, len(values))) for low in range(0, len(values), length)]
    groups = [runs[n : n + group] for n in range(0, len(runs), group)]

    def values_of(some):
        return ((low, values[low:high]) for low, high in some)

    (rank,) = order.find_ranks(values_of, groups, map, len(values), [count])
    return rank


def draw(kind, size, seed):
    normal = np.random.default_rng(seed).standard_normal(size)
    values = {
        "normal": normal,
        "quantised": np.round(normal * 3),
        "equal": np.ones(size),
        "zeros and one": (np.arange(size) == size // 3) * 1.0,
        "sorted": np.sort(normal),
        "two scales": np.where(np.arange(size) < size // 50, 1000 * normal, normal),
    }[kind]
    return np.abs(values).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "quantised", "equal", "zeros and one", "sorted", "two scales"])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.2, 0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("sample", [64, 1 << 20])
def test_a_rank_keeps_what_a_sort_would_keep(kind, share, sample, monkeypatch):
    monkeypatch.setattr(order, "SAMPLE", sample)
    monkeypatch.setattr(order, "MAX_KEPT", 500)
    values = draw(kind, 20_000, seed=1)
    count = round(share * len(values))
    found, index = search(values, count), np.arange(len(values))
    expected = rank_values(np, values, count).keeps(values, index)
    kept = found.keeps(values, index)
    assert kept.sum() == count
    np.testing.assert_array_equal(kept, expected)


def test_one_value_has_a_rank():
    values = np.array([0.5], np.float32)
    assert search(values, 1).keeps(values, np.arange(1)).all()
    assert not search(values, 0).keeps(values, np.arange(1)).any()


@pytest.mark.parametrize("kind", ["normal", "quantised", "two scales"])
def test_ranks_that_share_their_passes_are_those_of_each(kind):
    values = draw(kind, 20_000, seed=2)
    counts = [0, 200, 4000, 4200, 19_999, 20_000]
    runs = [(low, min(low + 1000, len(values))) for low in range(0, len(values), 1000)]
    ranks = order.find_ranks(lambda some: ((a, values[a:b]) for a, b in some), [runs], map, len(values), counts)
    for rank, count in zip(ranks, counts, strict=True):
        expected = search(values, count).keeps(values, np.arange(len(values)))
        np.testing.assert_array_equal(rank.keeps(values, np.arange(len(values))), expected)
