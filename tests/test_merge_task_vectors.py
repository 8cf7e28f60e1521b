"""Methods on task vectors, entry by entry, against plain NumPy loops and numbers worked out by hand."""

import numpy as np
import pytest

from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.half_reset import is_kept
from jaxtune.merge.registry import METHODS
from jaxtune.tree import flatten, unflatten

# Every merge below works in float64; what is left is the order of sums.
EXACT = dict(rtol=1e-12, atol=1e-14)


def merge(name, deltas, base=None, **options):
    """The merged task vector of one leaf, or of a tree of them."""
    if not isinstance(deltas[0], dict):
        return merge(name, [{"leaf": delta} for delta in deltas], base, **options)["leaf"]
    deltas = [{path: np.asarray(leaf, np.float64) for path, leaf in tree.items()} for tree in deltas]
    base = {path: np.zeros_like(leaf) for path, leaf in deltas[0].items()} if base is None else base
    models = [{path: base[path] + leaf for path, leaf in tree.items()} for tree in deltas]
    merged = flatten(merge_trees(METHODS[name], [unflatten(model) for model in models], unflatten(base), **options))
    return {path: leaf - base[path] for path, leaf in merged.items()}


def draw(count, shape=(7, 11), seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)))


def test_magmax_takes_the_largest_entry_and_the_later_task_among_equals():
    deltas = [(1, -2, 3), (-4, 0.5, 2), (0, -2.5, 3)]
    np.testing.assert_array_equal(merge("magmax", deltas), [-4, -2.5, 3])
    np.testing.assert_array_equal(merge("magmax", [(3.0,), (-3.0,)]), [-3])
    np.testing.assert_array_equal(merge("magmax", [(-3.0,), (3.0,)]), [3])
    np.testing.assert_array_equal(merge("magmax", deltas, **{"lambda": 0.0}), [0, 0, 0])


@pytest.mark.parametrize("min_tasks", [0, 1, 2, 3])
def test_consensus_keeps_what_enough_tasks_are_active_in(min_tasks):
    deltas = draw(3)
    threshold = (0.2, 0.4, 0.6)
    expected = np.zeros_like(deltas[0])
    for at in np.ndindex(expected.shape):
        total = sum(delta[at] for delta in deltas)
        active = sum(abs(delta[at]) > t * abs(total - delta[at]) for delta, t in zip(deltas, threshold, strict=True))
        expected[at] = 0.7 * total if active >= min_tasks else 0.0
    options = dict(threshold=list(threshold), min_tasks=min_tasks, **{"lambda": 0.7})
    np.testing.assert_allclose(merge("consensus", deltas, **options), expected, **EXACT)


def test_a_tall_mask_is_strict():
    deltas = [(0.0, 1.0, 2.0), (0.0, 2.0, 1.0)]
    # At threshold 1 an entry stays where the task's own part is larger than all the others' together.
    np.testing.assert_array_equal(merge("tall", deltas, task=0, threshold=1.0), [0, 0, 3])
    np.testing.assert_array_equal(merge("tall", deltas, task=1, threshold=1.0), [0, 3, 0])
    np.testing.assert_array_equal(merge("tall", deltas, task=0, threshold=0.5), [0, 0, 3])  # 1 > 0.5 * 2 is false


@pytest.mark.parametrize("name", ["tall", "emr"])
def test_one_task_alone_is_its_model_again(name):
    (delta,) = draw(1)
    np.testing.assert_allclose(merge(name, [delta], task=0), delta, **EXACT)


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("task", [None, 0, 2])
def test_emr_elects_masks_and_rescales(task, scope):
    shapes = {"a": (4, 5), "b": (3,)}
    deltas = [{path: draw(3, shape, seed=len(path + path))[t] for path, shape in shapes.items()} for t in range(3)]
    deltas[0]["b"][0], deltas[1]["b"][0], deltas[2]["b"][0] = 1.0, -2.0, 1.0  # the sum is zero: negative is elected
    unified, sums = {}, {}
    for path, shape in shapes.items():
        unified[path] = np.zeros(shape)
        for at in np.ndindex(shape):
            entries = [tree[path][at] for tree in deltas]
            sign = 1 if sum(entries) > 0 else -1
            unified[path][at] = sign * max([abs(e) for e in entries if e * sign > 0], default=0)
        if task is not None:
            mask = deltas[task][path] * unified[path] > 0
            sums[path] = np.abs(deltas[task][path]).sum(), np.abs(unified[path] * mask).sum()
            unified[path] = unified[path] * mask
    merged = merge("emr", deltas, task=task, scope=scope)
    assert task is not None or merged["b"][0] == -2
    for path in shapes:
        over = [path] if scope == "leaf" else list(shapes)
        scale = 1 if task is None else sum(sums[p][0] for p in over) / (sum(sums[p][1] for p in over) or 1)
        np.testing.assert_allclose(merged[path], unified[path] * scale, **EXACT)


@pytest.mark.parametrize("interaction", ["sum", "pairwise"])
def test_pcb_balances_entries_as_its_releases_do(interaction):
    deltas = draw(3, (150, 120))
    flat = np.stack([delta.reshape(-1) for delta in deltas])
    count, size = flat.shape

    def clamp(row, low_ratio, high_ratio):
        ordered = sorted(row)
        return np.clip(row, ordered[int(size * low_ratio)], ordered[int(size * (1 - high_ratio) - 1)])

    def unit(row):
        return (row - row.min()) / (row.max() - row.min())

    scales, clamped = [], []
    for task in range(count):
        magnitude = clamp(np.abs(flat[task]), 1e-4, 1e-4)
        clamped.append(np.sign(flat[task]) * magnitude)
        if interaction == "sum":
            inter = np.tanh(flat[task] * flat.sum(axis=0))
        else:
            inter = sum(np.tanh(flat[task] * flat[other]) for other in range(count))
        scales.append(unit(clamp(np.exp(count * unit(magnitude) ** 2) * inter, 0.9, 0)))
    released, expected = (
        1.2
        * sum(c * np.where(s > least, s, 0) for c, s in zip(clamped, scales, strict=True))
        / np.maximum(sum(np.where(s > least, s, 0) for s in scales), 1e-12)
        for least in (0.0, 1e-5)
    )
    merged = merge("pcb", deltas, interaction=interaction).reshape(-1)
    np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-12)
    # Entries with almost no score: one of a task at its quantile, and few beside it.
    assert np.count_nonzero(np.abs(merged - released) > 1e-9) <= 3


def test_the_two_releases_of_pcb_disagree():
    deltas = draw(3)
    assert np.abs(merge("pcb", deltas) - merge("pcb", deltas, interaction="pairwise")).max() > 0.1


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_metagpt_weighs_by_squared_lengths(scope):
    trees = [{"a": np.full((2, 2), t + 1.0), "b": np.full(3, 2.0 - t)} for t in range(2)]
    squares = {path: np.array([np.sum(tree[path] ** 2) for tree in trees]) for path in "ab"}
    merged = merge("metagpt", trees, scope=scope)
    for path in "ab":
        weights = squares[path] if scope == "leaf" else squares["a"] + squares["b"]
        weights = weights / weights.sum()
        np.testing.assert_allclose(merged[path], weights[0] * trees[0][path] + weights[1] * trees[1][path], **EXACT)


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_a_graft_keeps_exactly_the_largest(scope):
    tree = {"a": draw(1, (10, 20))[0], "b": 10 * draw(1, (30,), seed=1)[0]}
    merged = merge("graft", [tree], share=0.1, scope=scope)
    kept = {path: int(np.count_nonzero(leaf)) for path, leaf in merged.items()}
    if scope == "leaf":
        assert kept == {"a": 20, "b": 3}
    else:
        assert sum(kept.values()) == 23
        assert kept["b"] > 15  # the larger leaf takes most of the budget
    for path, leaf in merged.items():
        np.testing.assert_array_equal(leaf[leaf != 0], tree[path][leaf != 0])
    largest = np.sort(np.abs(np.concatenate([leaf.reshape(-1) for leaf in tree.values()])))[-23:]
    if scope == "model":
        found = np.abs(np.concatenate([leaf.reshape(-1) for leaf in merged.values()]))
        np.testing.assert_array_equal(np.sort(found[found > 0]), largest)


def test_a_graft_of_equal_entries_takes_the_first():
    np.testing.assert_array_equal(merge("graft", [np.ones(10)], share=0.3), [1, 1, 1, 0, 0, 0, 0, 0, 0, 0])


def test_bitdelta_is_the_nearest_multiple_of_the_signs():
    (delta,) = draw(1)
    merged = merge("bitdelta", [delta])
    signs = np.sign(delta)
    best = np.sum(signs * delta) / np.sum(signs * signs)  # least squares
    np.testing.assert_allclose(merged, best * signs, **EXACT)
    np.testing.assert_allclose(merge("bitdelta", [delta[0]]), delta[0], **EXACT)  # a vector keeps what it is


def test_half_reset_keeps_two_of_four_and_follows_seed_and_names():
    names = [f"block_{n}/attn/{part}/kernel" for n in range(200) for part in "qkvo"]
    kept = {name: is_kept(3, 0, name, level="category") for name in names}
    for n in range(200):
        assert sum(kept[f"block_{n}/attn/{part}/kernel"] for part in "qkvo") == 2
    share = np.mean([kept[f"block_{n}/attn/q/kernel"] for n in range(200)])
    assert 0.35 < share < 0.65  # 200 coins: four standard deviations are 0.14
    assert kept == {name: is_kept(3, 0, name, level="category") for name in names}
    assert kept != {name: is_kept(4, 0, name, level="category") for name in names}
    assert kept != {name: is_kept(3, 1, name, level="category") for name in names}


def test_half_reset_treats_categories_as_the_paper_does():
    def kept(name):
        return is_kept(0, 0, name, level="category")

    counts = [sum(kept(f"model.layers.{n}.mlp.{p}_proj.weight") for p in ("gate", "up", "down")) for n in range(200)]
    assert set(counts) == {1, 2}
    assert 0.35 < np.mean(np.array(counts) == 2) < 0.65
    for n in range(20):
        assert kept(f"h.{n}.mlp.c_fc.bias") == kept(f"h.{n}.mlp.c_fc.weight")
        norms = ("input_layernorm", "post_attention_layernorm")
        assert sum(kept(f"model.layers.{n}.{norm}.weight") for norm in norms) == 1
    assert kept("model.embed_tokens.weight")
    assert kept("lm_head.weight")


def test_half_reset_keeps_one_of_two_layers():
    def kept(name, seed=0):
        return is_kept(seed, 0, name, level="layer")

    for seed in range(4):
        whole = [kept(f"model.layers.{n}.self_attn.q_proj.weight", seed) for n in range(24)]
        assert [sum(whole[n : n + 2]) for n in range(0, 24, 2)] == [1] * 12
        assert whole == [kept(f"model.layers.{n}.mlp.experts.7.up.weight", seed) for n in range(24)]
        assert 0 < sum(whole[::2]) < 12
    assert kept("model.embed_tokens.weight")
    assert kept("block_0/attn/q/kernel") != kept("block_1/mlp/up/bias")
    assert kept("final_norm/scale")


@pytest.mark.parametrize("level", ["leaf", "category", "layer"])
def test_half_reset_moves_whole_leaves(level):
    tree = {f"block_{n}/mlp/{part}/kernel": draw(1)[0] for n in range(8) for part in ("fc1", "fc2")}
    merged = merge("half_reset", [tree], level=level, seed=5)
    whole = [np.array_equal(merged[path], tree[path]) for path in tree]
    assert 0 < sum(whole) < len(tree)
    assert all(is_whole or not merged[path].any() for is_whole, path in zip(whole, tree, strict=True))


@pytest.mark.parametrize("name", ["consensus", "emr", "metagpt", "graft", "bitdelta", "pcb"])
def test_the_order_of_tasks_does_not_matter(name):
    deltas = draw(3)
    np.testing.assert_allclose(merge(name, deltas[::-1]), merge(name, deltas), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("magmax", {}),
        ("emr", {}),
        ("metagpt", {}),
        ("graft", {"share": 1.0}),
        ("consensus", {"min_tasks": 1}),
        ("tall", {"task": 0}),
    ],
)
def test_one_whole_task_vector_is_the_finetuned_model(name, options):
    (delta,) = draw(1)
    base = {"leaf": draw(1, seed=1)[0]}
    merged = merge_trees(METHODS[name], [{"leaf": base["leaf"] + delta}], base, **options)
    np.testing.assert_allclose(merged["leaf"], base["leaf"] + delta, **EXACT)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("consensus", "threshold", -0.1),
        ("consensus", "min_tasks", 4),
        ("tall", "task", 3),
        ("emr", "task", -1),
        ("graft", "share", 1.5),
        ("pcb", "ratio", 1.5),
    ],
)
def test_an_option_out_of_range_is_named(name, option, value):
    options = {"task": 0, option: value} if name == "tall" else {option: value}
    with pytest.raises(ConfigError, match=f"option '{option}'"):
        merge(name, draw(3), **options)


@pytest.mark.parametrize(
    ("name", "option"), [("emr", "scope"), ("metagpt", "scope"), ("graft", "scope"), ("pcb", "interaction"),
                         ("half_reset", "level")]
)  # fmt: skip
def test_an_unknown_choice_is_named(name, option):
    with pytest.raises(UnknownNameError, match=f"option '{option}'"):
        merge(name, draw(2), **{option: "row"})
