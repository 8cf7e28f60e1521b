"""Task vectors of which a part is kept: how many, which, with which odds, and rescaled by how much."""

import math

import ml_dtypes
import numpy as np
import pytest

from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.merge import arcee_fusion, arrays, sce
from jaxtune.merge.arrays import ArrayView, merge_trees
from jaxtune.merge.random_bits import draw_bits, draw_uniform, make_stream
from jaxtune.merge.registry import METHODS


def merge(name, deltas, base=None, *, seed=0, input_axis=-1, **options):
    """The merged task vector of one leaf called "leaf"."""
    deltas = [np.asarray(delta, np.float64) for delta in deltas]
    base = np.zeros_like(deltas[0]) if base is None else np.asarray(base, np.float64)
    models = [{"leaf": base + delta} for delta in deltas]
    return (
        merge_trees(METHODS[name], models, {"leaf": base}, seed=seed, input_axis=input_axis, **options)["leaf"] - base
    )


def test_task_arithmetic_by_hand():
    assert merge_trees(METHODS["task_arithmetic"], [{"a": np.float64([3])}], {"a": np.float64([1])}, weight=0.25) == {
        "a": np.float64([1.5])
    }


def test_negation_undoes_and_an_analogy_carries_over():
    base, model, other = np.random.default_rng(0).standard_normal((3, 50))
    found = merge("task_arithmetic", [model - base] * 2, base, weight=(1, -1))
    np.testing.assert_allclose(found, 0, atol=1e-15)
    # other + (model - base), and with other = base the model.
    found = merge("task_arithmetic", [model - base, other - base], base)
    np.testing.assert_allclose(base + found, other + (model - base), rtol=1e-14, atol=1e-14)
    found = merge("task_arithmetic", [model - base, base - base], base)
    np.testing.assert_allclose(base + found, model, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (1e-9, 5), (0.4, 5), (1.0, 5)])
def test_ties_keeps_the_only_element_at_any_density_but_zero(density, kept):
    assert merge("ties", [[5.0]], density=density) == [kept]


def test_ties_keeps_the_largest_of_three():
    for density in (0.01, 0.5):
        np.testing.assert_array_equal(merge("ties", [(1, -4, 2)], density=density), (0, -4, 0))


def test_ties_of_two_integer_matrices():
    rows = [(-1.0, 2, 3, 4), (4.0, -3, 2, 1), (3.0, 4, 1, -2), (2.0, 1, -4, 3)]
    deltas = [rows, rows[2:] + rows[:2]]
    # sd-mecha's conventions: all equal to the first that ought to go, signs are counted, a draw elects nobody.
    options = dict(equals="all", count="one_more", vote="count", zero_vote="none", normalize="count")
    found = merge("ties", deltas, density=0.5, **options)
    np.testing.assert_array_equal(found, [(3, 3, 3, 0), (3, -3, 0, 3)] * 2)
    # By the sum of values 4 wins over -2.
    found = merge("ties", deltas, density=0.5, **{**options, "vote": "sum"})
    np.testing.assert_array_equal(found[0], (3, 3, 3, 4))


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.3333, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("input_axis", [0, -1])
def test_a_trim_keeps_exactly_so_many(density, input_axis):
    delta = np.random.default_rng(0).standard_normal((128, 64))
    for leaf in (delta, np.asfortranarray(delta)):
        found = merge("ties", [leaf], density=density, input_axis=input_axis)
        assert np.count_nonzero(found) == math.floor(density * delta.size)
        kept = np.abs(delta)[found != 0]
        assert kept.size == 0 or kept.min() >= np.sort(np.abs(delta), axis=None)[-kept.size]
        np.testing.assert_array_equal(found[found != 0], delta[found != 0])


@pytest.mark.parametrize("run", [7, 1 << 16])
def test_equal_magnitudes_are_kept_by_place_in_runs_of_any_length(run, monkeypatch):
    monkeypatch.setattr(arrays, "RUN", run)
    delta = np.tile([1.0, -2.0, 2.0, 0.5], 10)
    found = merge("ties", [delta], density=0.375)  # 15 of the 20 of magnitude 2
    expected = np.where(np.abs(delta) == 2, delta, 0)
    expected[np.flatnonzero(expected)[15:]] = 0
    np.testing.assert_array_equal(found, expected)
    assert np.count_nonzero(merge("ties", [delta], density=0.375, equals="all")) == 20
    # The same in pieces, as an engine asks: whether a run is before, at or behind the last that is kept.
    models, base = [[delta]], [np.zeros(40)]
    view = ArrayView(["leaf"], models, base, unit="element")
    combine = METHODS["ties"].prepare(view, {**METHODS["ties"].options, "density": (0.375,), "weight": (0.5,)})
    pieces = [combine(elements) for elements in view.runs(0)]
    np.testing.assert_array_equal(np.concatenate(pieces), expected)


@pytest.mark.parametrize(("gamma", "kept"), [(0, range(7, 13)), (0.01, range(7, 13)), (0.25, range(4, 10))])
def test_breadcrumbs_remove_the_largest_too(gamma, kept):
    delta = np.arange(1.0, 13).reshape(4, 3).T
    found = merge("breadcrumbs", [delta], density=0.5, gamma=gamma)
    np.testing.assert_array_equal(np.sort(found[found != 0]), kept)


def test_breadcrumbs_remove_fewer_of_the_largest_where_too_few_were_left():
    delta = np.arange(1.0, 13)
    np.testing.assert_array_equal(
        merge("breadcrumbs", [delta], density=0.9, gamma=0.5), np.where(delta <= 10, delta, 0)
    )
    np.testing.assert_array_equal(merge("breadcrumbs", [delta], density=0.0, gamma=0.5), 0 * delta)
    np.testing.assert_array_equal(merge("breadcrumbs", [delta], density=1.0, gamma=0.5), delta)


def test_dare_keeps_its_rate_and_restores_the_norm():
    delta, density, draws = np.random.default_rng(0).standard_normal(400), 0.3, 1000
    norms, counts, total = [], np.zeros(400), np.zeros(400)
    for seed in range(draws):
        found = merge("dare_linear", [delta], density=density, seed=seed)
        norms.append(np.abs(found).sum())
        counts += found != 0
        total += merge("dare_linear", [delta], density=density, seed=seed, preset="paper")
    assert abs(np.mean(norms) / np.abs(delta).sum() - 1) < 0.01
    sigma = math.sqrt(density * (1 - density) / (draws * delta.size))
    assert abs(counts.sum() / (draws * delta.size) - density) < 4 * sigma
    # By 1/density the mean over draws is the task vector, every element of it; 5 sigma for the worst of 400.
    sigma = np.abs(delta) * math.sqrt((1 / density - 1) / draws)
    assert np.all(np.abs(total / draws - delta) < 5 * sigma)
    # An element's draws are independent of its neighbour's.
    assert abs(np.corrcoef(counts[1:], counts[:-1])[0, 1]) < 5 / math.sqrt(399)


def test_draws_belong_to_seed_model_leaf_and_element():
    delta = np.ones(1000)
    kept = merge("dare_linear", [delta], density=0.5, rescale=False) != 0
    np.testing.assert_array_equal(merge("dare_linear", [delta[:700]], density=0.5, rescale=False) != 0, kept[:700])
    np.testing.assert_array_equal(merge("dare_ties", [3 * delta], density=0.5, rescale=False) != 0, kept)
    both = merge("dare_linear", [delta, 10 * delta], density=0.5, rescale=False)
    np.testing.assert_array_equal(both % 10 != 0, kept)
    assert 400 < np.count_nonzero((both >= 10) == kept) < 600
    assert np.any((merge("dare_linear", [delta], density=0.5, seed=1) != 0) != kept)


def test_words_across_and_up_to_two_to_the_32():
    stream = make_stream(3, 2, "leaf")
    for start, size in [((1 << 32) - 7, 20), ((1 << 32) - 20, 20), ((1 << 33) - 3, 20), (5, 0)]:
        words = draw_bits(np, stream, start, (size,))
        one_by_one = [draw_bits(np, stream, start + n, (1,))[0] for n in range(size)]
        np.testing.assert_array_equal(words, np.array(one_by_one, np.uint32))


@pytest.mark.parametrize("rescale", ["l1", "l2", "linf", True])
@pytest.mark.parametrize("name", ["ties", "dare_linear", "breadcrumbs", "della_linear"])
def test_norms_are_restored(name, rescale):
    delta = np.random.default_rng(0).standard_normal((20, 30))
    order = {"l1": 1, "l2": 2, "linf": np.inf, True: 1}[rescale]
    found = merge(name, [delta], density=0.4, rescale=rescale)
    assert np.count_nonzero(found) < 350
    assert np.linalg.norm(found.ravel(), order) == pytest.approx(np.linalg.norm(delta.ravel(), order), rel=1e-12)
    tiny = merge(name, [delta * 1e-12], density=0.4, rescale=rescale)
    assert np.abs(tiny).max() < 4e-12  # below mergekit's bound nothing is divided
    assert merge(name, [np.zeros((0, 4))] * 2, density=0.4, rescale=rescale).shape == (0, 4)


def test_della_decides_by_the_rank_in_the_row():
    delta = np.random.default_rng(0).standard_normal((6, 40))
    found = merge("della_linear", [delta], density=0.5, epsilon=0.4, rescale=False)
    uniform = draw_uniform(np, make_stream(0, 0, "leaf"), 0, delta.shape)
    rank = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    np.testing.assert_array_equal(found != 0, uniform < 0.1 + rank / 39 * 0.8)


def test_della_odds_by_rank_and_shared_by_equals():
    row, draws = np.array([1.0, -2, 3, 3, -3, 3, 3, 8]), 4000
    counts = np.zeros((16, 8))
    for seed in range(draws // 16):
        found = merge("della_linear", [np.tile(row, (16, 1))], density=0.5, epsilon=0.3, rescale=False, seed=seed)
        counts += found != 0
    odds = 0.2 + np.array([0, 1, 4, 4, 4, 4, 4, 7]) / 7 * 0.6  # the five equal ones are of ranks 2 to 6
    np.testing.assert_allclose(counts.sum(axis=0) / draws, odds, atol=5 * 0.5 / math.sqrt(draws))


def test_della_of_rows_of_one_element():
    found = merge("della_linear", [np.ones((4000, 1))], density=0.3, epsilon=0.1, rescale=False)
    assert abs(np.count_nonzero(found) / 4000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    found = merge("della_linear", [np.ones((100, 40))], density=0.3, epsilon=0.0, rescale=False)
    assert abs(np.count_nonzero(found) / 4000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.5, -0.1), (0.5, 0.5)])
def test_odds_beyond_0_and_1_are_refused(name, density, epsilon):
    with pytest.raises(ConfigError, match="epsilon"):
        merge(name, [np.ones(4)], density=density, epsilon=epsilon)
    assert merge(name, [np.ones(4)], density=1.0, epsilon=epsilon).sum() == 4
    assert merge(name, [np.ones(4)], density=0.0, epsilon=epsilon).sum() == 0


@pytest.mark.parametrize("density", [-0.1, 1.1, 20])
@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if "density" in method.options and name != "task_arithmetic"]
)
def test_a_density_beyond_0_and_1_is_refused(name, density):
    with pytest.raises(ConfigError, match="density"):
        merge(name, [np.ones(4)], density=density)


@pytest.mark.parametrize(("name", "option"), [("breadcrumbs", "gamma"), ("sce", "select_topk")])
def test_other_shares_are_checked_too(name, option):
    with pytest.raises(ConfigError, match=option):
        merge(name, [np.ones(4)], **{option: 1.5})
    with pytest.raises(UnknownNameError, match="l3"):
        merge("dare_ties", [np.ones(4)], rescale="l3")


def test_sce_without_variance():
    delta = np.array([0.5, -2.0, 1.0])
    np.testing.assert_array_equal(merge("sce", [delta] * 3), delta)
    np.testing.assert_array_equal(merge("sce", [delta] * 3, select_topk=0.9), 0 * delta)
    base = np.array([0.1, 0.2, 0.3])  # thirds of sums that are not exact are no variance either
    np.testing.assert_array_equal(merge("sce", [0.7 * delta] * 3, base, select_topk=0.9), 0 * delta)


def test_sce_weighs_by_energy_however_small():
    deltas = np.array([[1e-5, -2e-5], [3e-5, 1e-5]])
    energy = (deltas**2).sum(axis=1)
    found = merge("sce", deltas, preset="paper")
    # Without a minority the mean of the first is weighted; of the second the majority by sum is negative.
    np.testing.assert_allclose(found, [(deltas[:, 0] @ energy) / energy.sum(), -2e-5], rtol=1e-12)
    np.testing.assert_allclose(merge("sce", deltas)[0], 2e-5, rtol=1e-12)  # mergekit's bound: equal weights
    assert sce.SCE.options["min_energy"] == 1e-6


def test_ram_keeps_what_is_unique_and_averages_what_is_shared():
    deltas = [(1.0, 2.0, 0.0, 1e-6), (3.0, 0.0, 0.0, 0.0), (5.0, 0.0, -4.0, 0.0)]
    np.testing.assert_allclose(merge("ram", deltas), (3, 2, -4, 0))
    np.testing.assert_allclose(merge("ramplus_tl", deltas), (3, 2 * 1.02, -4 * 1.02, 0))  # one shared, one unique each
    np.testing.assert_allclose(merge("ramplus_tl", deltas, r=2.0, alpha=9.0), (3, 6, -12, 0))


def test_arcee_fusion_takes_lower_order_statistics(monkeypatch):
    monkeypatch.setattr(arcee_fusion, "find_importance", lambda elements: abs(elements.deltas[0]))
    delta = np.random.default_rng(0).permutation(12).reshape(3, 4).astype(float)
    view = ArrayView(["leaf"], [[delta]], [np.zeros((3, 4))], unit="row", input_axis=-1)
    assert METHODS["arcee_fusion"].prepare(view, {}).numbers == (14,)  # 5 + 1.5 (8 - 2)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "breadcrumbs_ties", "sce", "ram", "model_stock"])
def test_bfloat16_is_computed_in_float32(name):
    draw = np.random.default_rng(0)
    models = [[draw.standard_normal((8, 30)).astype(ml_dtypes.bfloat16)] for _ in range(3)]
    method = METHODS[name]
    options = {**method.options, **{o: (0.5 if o == "density" else method.options[o],) * 2 for o in method.per_model}}
    view = ArrayView(["leaf"], [[models[0][0], models[1][0]]], models[2], unit=method.unit_of(options))
    assert method.prepare(view, options)(view.whole(0)).dtype == np.float32
