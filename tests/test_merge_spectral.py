"""Spectral methods against loops of full SVDs in NumPy, and what their results must be whatever the data."""

import numpy as np
import pytest

from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.isotropic import split_rank
from jaxtune.merge.registry import METHODS
from jaxtune.tree import flatten

# Singular vectors are taken from Gram matrices in float64: condition number squared times 1e-16, and these have 1e2.
CLOSE = dict(rtol=1e-9, atol=1e-11)
SHAPES = [(32, 48), (48, 32), (20, 20)]
SPECTRAL = ["tsv_m", "iso_c", "iso_cts", "knots", "core_space", "star", "cart", "calibration", "subspace_boosting",
            "wudi", "ace"]  # fmt: skip


def draw(count=3, shape=(32, 48), seed=0, rank=None):
    """Task vectors as torch stores them: outputs by inputs."""
    random = np.random.default_rng(seed)
    if rank is None:
        return list(random.standard_normal((count, *shape)))
    return [random.standard_normal((shape[0], rank)) @ random.standard_normal((rank, shape[1])) for _ in range(count)]


def merge(name, deltas, *, input_axis=-1, **options):
    """The merged task vector."""
    base = {"w": np.random.default_rng(99).standard_normal(deltas[0].shape)}
    merged = merge_trees(METHODS[name], [{"w": base["w"] + d} for d in deltas], base, input_axis=input_axis, **options)
    return merged["w"] - base["w"]


def polar_by_svd(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def truncate(matrix, rank):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def tsv_by_svd(deltas, count=None):
    """TSV-M as released: T + 2 full SVDs."""
    rank = min(deltas[0].shape)
    kept = rank // len(deltas) if count is None else count
    lefts, values, rights = [], [], []
    for delta in deltas:
        left, value, right = np.linalg.svd(delta, full_matrices=False)
        lefts.append(left[:, :kept])
        values.append(value[:kept])
        rights.append(right[:kept])
    left, right = polar_by_svd(np.hstack(lefts)), polar_by_svd(np.vstack(rights))
    return left @ np.diag(np.concatenate(values)) @ right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_tsv_m_equals_a_loop_of_svds(shape, count):
    deltas = draw(count, shape)
    np.testing.assert_allclose(merge("tsv_m", deltas), tsv_by_svd(deltas), **CLOSE)


def test_tsv_m_keeps_as_many_directions_as_asked():
    deltas = draw()
    np.testing.assert_allclose(merge("tsv_m", deltas, rank_share=0.125), tsv_by_svd(deltas, 4), **CLOSE)
    assert np.linalg.matrix_rank(merge("tsv_m", deltas, rank_share=0.125)) == 12  # the sum of the ranks


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_equals_an_svd_and_is_flat(shape):
    deltas = draw(3, shape)
    left, values, right = np.linalg.svd(sum(deltas), full_matrices=False)
    merged = merge("iso_c", deltas)
    np.testing.assert_allclose(merged, left * values.mean() @ right, **CLOSE)
    found = np.linalg.svd(merged, compute_uv=False)
    np.testing.assert_allclose(found, values.mean(), rtol=1e-9)


@pytest.mark.parametrize("fraction", [0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_equals_a_loop_of_svds_and_is_flat(shape, fraction):
    deltas, rank = draw(3, shape), min(shape)
    own = round((rank - int(rank * fraction)) / 3)
    common = rank - 3 * own
    left, value, right = np.linalg.svd(sum(deltas), full_matrices=False)
    lefts, values, rights = [left[:, :common]], [value[:common]], [right[:common]]
    for delta in deltas:
        rest = delta - left[:, :common] @ left[:, :common].T @ delta
        one_left, one_value, one_right = np.linalg.svd(rest, full_matrices=False)
        lefts.append(one_left[:, :own])
        values.append(one_value[:own])
        rights.append(one_right[:own])
    mean = np.concatenate(values).mean()
    expected = polar_by_svd(np.hstack(lefts)) @ polar_by_svd(np.vstack(rights)) * mean
    merged = merge("iso_cts", deltas, common_fraction=fraction)
    # All vectors together are near to dependent (condition number 1e4 here), and a Gram matrix squares that.
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(np.linalg.svd(merged, compute_uv=False), mean, rtol=1e-9)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("rank", "count"), [(1, 3), (5, 3), (32, 3), (7, 2), (3, 8)])
def test_the_rank_of_iso_cts_is_shared_out_whole(rank, count, fraction):
    common, own = split_rank(rank, count, fraction)
    assert common + count * own == rank
    assert common >= 0 <= own


def test_one_task_comes_back_from_subspaces_and_least_squares():
    (delta,) = draw(1)
    for name in ("tsv_m", "knots", "core_space", "wudi"):
        np.testing.assert_allclose(merge(name, [delta]), delta, **CLOSE, err_msg=name)
    inside = {"inside": "task_arithmetic"}
    np.testing.assert_allclose(merge("calibration", [delta], **inside), delta, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
def test_knots_runs_a_method_on_blocks_of_one_basis(shape):
    deltas = draw(3, shape)
    left, values, right = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    blocks = np.split(right, 3, axis=1)
    # Linear methods do not see the basis, so the sum comes back; the largest entry of each place depends on it. Signs
    # of singular vectors are arbitrary, and MagMax turns with them.
    np.testing.assert_allclose(merge("knots", deltas, inside="task_arithmetic"), sum(deltas), **CLOSE)
    for scaled in (True, False):
        parts = np.stack([values[:, None] * block if scaled else block for block in blocks])
        place = np.abs(parts).argmax(axis=0)
        largest = np.take_along_axis(parts, place[None], axis=0)[0] * (1 if scaled else values[:, None])
        merged = merge("knots", deltas, inside="magmax", scaled=scaled)
        np.testing.assert_allclose(merged, left @ largest, rtol=1e-7, atol=1e-9)


def test_knots_drops_directions_that_no_task_has():
    deltas = draw(2, rank=3)
    merged = merge("knots", deltas, inside="ties", inside_options={"density": 0.5})
    left, values, right = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    blocks = [b.reshape(-1) for b in np.split(values[:6, None] * right[:6], 2, axis=1)]  # six rows, not thirty-two
    kept = []
    for block in blocks:
        least = np.sort(np.abs(block))[-len(block) // 2]
        kept.append(np.where(np.abs(block) >= least, block, 0))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agree = [(k != 0) & (np.sign(k) == sign) for k in kept]
    total = sum(np.where(a, k, 0) for a, k in zip(agree, kept, strict=True)) / np.maximum(sum(agree), 1)
    np.testing.assert_allclose(merged, left[:, :6] @ total.reshape(6, -1), rtol=1e-7, atol=1e-9)


def test_core_space_runs_a_method_on_cores():
    deltas = draw(2, rank=3)
    left = np.linalg.svd(np.hstack(deltas))[0][:, :6]
    right = np.linalg.svd(np.vstack(deltas))[2][:6]
    for rank in (None, 3):
        merged = merge("core_space", deltas, inside="task_arithmetic", rank=rank)
        np.testing.assert_allclose(merged, sum(deltas), rtol=1e-6, atol=1e-8)
    cores = np.stack([left.T @ delta @ right.T for delta in deltas])
    largest = np.take_along_axis(cores, np.abs(cores).argmax(axis=0)[None], axis=0)[0]
    merged = merge("core_space", deltas, inside="magmax")
    np.testing.assert_allclose(merged, left @ largest @ right, rtol=1e-6, atol=1e-8)


def test_random_methods_inside_follow_the_seed():
    deltas = draw()
    options = dict(inside="dare_linear", inside_options={"density": 0.5})
    first, second = (merge("knots", deltas, seed=1, **options) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - merge("knots", deltas, seed=2, **options)).max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_star_truncates_and_restores_the_nuclear_norm(shape):
    deltas = draw(3, shape)
    expected = np.zeros(shape)
    for delta in deltas:
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        rank = 1
        while values[:rank].sum() < 0.4 * values.sum():
            rank += 1
        kept = values[:rank] * values.sum() / values[:rank].sum()
        expected += left[:, :rank] * kept @ right[:rank] / 3
    np.testing.assert_allclose(merge("star", deltas), expected, **CLOSE)
    nuclear = np.linalg.svd(merge("star", deltas[:1]), compute_uv=False).sum()
    np.testing.assert_allclose(nuclear, np.linalg.svd(deltas[0], compute_uv=False).sum(), rtol=1e-9)


def test_cart_centres_on_the_average():
    deltas = draw()
    mean = sum(deltas) / 3
    expected = mean + 0.7 * sum(truncate(delta - mean, 16) for delta in deltas)
    np.testing.assert_allclose(merge("cart", deltas, rank_share=0.5, **{"lambda": 0.7}), expected, **CLOSE)
    np.testing.assert_allclose(merge("cart", deltas, rank_share=1.0), mean, **CLOSE)  # the parts sum to nothing


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_calibration_lowers_what_tasks_counted_twice(alpha):
    deltas = [delta + 2 * draw(1, seed=7, rank=4)[0] for delta in draw()]  # much in common
    left, values, right = np.linalg.svd(sum(deltas), full_matrices=False)
    expected = values.copy()
    for r in range(len(values)):
        ours = left[:, r] @ sum(deltas)
        theirs = [left[:, r] @ delta for delta in deltas]
        expected[r] *= 3 / sum(max(alpha, ours @ one / (one @ one)) for one in theirs)
    merged = merge("calibration", deltas, alpha=alpha)
    np.testing.assert_allclose(merged, left * expected @ right, **CLOSE)
    if alpha == 1:
        assert (expected <= values * (1 + 1e-12)).all()
        assert expected[0] < 0.5 * values[0]


def test_subspace_boosting_raises_small_singular_values():
    deltas = draw()
    left, values, right = np.linalg.svd(sum(deltas), full_matrices=False)
    place = int(np.argmax(np.cumsum(values) >= 0.3 * values.sum()))
    expected = left * np.maximum(values, values[place]) @ right
    np.testing.assert_allclose(merge("subspace_boosting", deltas, beta=0.3), expected, **CLOSE)
    np.testing.assert_allclose(merge("subspace_boosting", deltas, beta=1.0), sum(deltas), **CLOSE)


@pytest.mark.parametrize("name", SPECTRAL)
def test_axes_of_torch_and_of_ours_give_the_same(name):
    deltas = draw()
    other = merge(name, [delta.T for delta in deltas], input_axis=0)
    np.testing.assert_allclose(other.T, merge(name, deltas), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SPECTRAL)
def test_scale_0_is_the_base_and_zero_task_vectors_too(name):
    deltas = draw()
    if name != "cart":  # whose scale is that of what is added to the average
        np.testing.assert_array_equal(merge(name, deltas, **{"lambda": 0.0}), 0 * deltas[0])
    np.testing.assert_allclose(merge(name, [0 * delta for delta in deltas]), 0 * deltas[0], atol=1e-14)


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_order_of_tasks_does_not_matter(name):
    deltas = draw()
    np.testing.assert_allclose(merge(name, deltas[::-1]), merge(name, deltas), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "star", "knots", "core_space", "calibration", "subspace_boosting"])
def test_the_rank_is_at_most_the_sum_of_ranks(name):
    deltas = draw(3, rank=2)
    merged = merge(name, deltas)
    assert np.linalg.matrix_rank(merged, tol=1e-6) <= 6
    assert np.isfinite(merged).all()


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_small_matrices(name, shape):
    assert np.isfinite(merge(name, draw(3, shape))).all()


def test_a_matrix_of_fewer_rows_than_tasks_keeps_its_update():
    deltas = draw(3, (2, 9))
    assert np.abs(merge("tsv_m", deltas)).max() > 0.1  # two over three is no direction; one is kept


@pytest.mark.parametrize(("others", "factor"), [("average", 1 / 3), ("sum", 1.0), ("base", 0.0)])
@pytest.mark.parametrize("name", SPECTRAL)
def test_leaves_that_are_no_matrices(name, others, factor):
    for deltas in (draw(3, (5,)), draw(3, (2, 3, 4))):
        merged = merge(name, deltas, others=others)
        np.testing.assert_allclose(merged, factor * sum(deltas), rtol=1e-12, atol=1e-14)


def test_float16_and_bfloat16_leaves_keep_their_dtype():
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16):
        base = {"w": draw(1)[0].astype(dtype)}
        models = [{"w": (base["w"].astype(np.float32) + 0.1 * delta).astype(dtype)} for delta in draw()]
        merged = flatten(merge_trees(METHODS["tsv_m"], models, base, input_axis=-1))["w"]
        expected = tsv_by_svd([m["w"].astype(np.float64) - base["w"].astype(np.float64) for m in models])
        assert merged.dtype == dtype
        ulp = float(ml_dtypes.finfo(dtype).eps) * 4
        np.testing.assert_allclose(merged.astype(float), base["w"].astype(float) + expected, atol=ulp, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tsv_m", {"rank_share": 1.5}, "option 'rank_share'"),
        ("iso_cts", {"common_fraction": -0.1}, "option 'common_fraction'"),
        ("star", {"share": 2.0}, "option 'share'"),
        ("cart", {"rank_share": 2.0}, "option 'rank_share'"),
        ("knots", {"inside": "tsv_m"}, "option 'inside': 'tsv_m' works on whole matrices"),
        ("knots", {"inside": "slerp"}, "cannot run inside"),
        ("core_space", {"inside": "knots"}, "option 'inside'"),
        ("core_space", {"rank": 0}, "option 'rank'"),
        ("knots", {"inside_options": {"density": 3.0}}, "option 'density'"),
        ("knots", {"inside_options": 3}, "option 'inside_options'"),
        ("calibration", {"alpha": -1}, "option 'alpha'"),
        ("subspace_boosting", {"beta": 1.5}, "option 'beta'"),
        ("wudi", {"ridge": -1.0}, "option 'ridge'"),
        ("ace", {"refined_share": 2.0}, "option 'refined_share'"),
    ],
)
def test_an_option_out_of_range_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        merge(name, draw(), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tsv_m", {"others": "keep"}),
        ("knots", {"inside": "tied"}),
        ("knots", {"inside_options": {"desnity": 0.5}}),
        ("wudi", {"solver": "open"}),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name, options):
    with pytest.raises(UnknownNameError, match="Known: "):
        merge(name, draw(), **options)
