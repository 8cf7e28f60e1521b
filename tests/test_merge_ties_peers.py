"""TIES in the conventions of PEFT, of FusionBench and of the paper's code, each against that peer's rule.

PEFT is called. The other two cannot be installed beside it: their rule is written here as plain loops, read off
`ties_merging_utils.py` of FusionBench 0.2 and `merge_utils.py` of ties-merging.
"""

import math

import numpy as np
import pytest

from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS

SHAPES = {"a": (9, 14), "b": (31,), "c": (1,)}


def draw(count, seed=0, levels=None):
    """Task vectors; with `levels` of few values each, so that many magnitudes and votes are equal."""
    draw = np.random.default_rng(seed)
    trees = []
    for _ in range(count):
        tree = {path: draw.standard_normal(shape) for path, shape in SHAPES.items()}
        tree = {path: np.round(leaf * levels) / levels if levels else leaf for path, leaf in tree.items()}
        tree["b"] = tree["b"] * 0.125  # another scale, which a threshold for all leaves sees
        trees.append(tree)
    return trees


def merge(deltas, **options):
    """Merged task vectors; the base is zero, so that they are exact."""
    base = {path: np.zeros_like(leaf) for path, leaf in deltas[0].items()}
    return merge_trees(METHODS["ties"], deltas, base, **options)


def merge_by_hand(deltas, density, scale, average):
    """The rule of ties-merging and of FusionBench, on all leaves as one vector."""
    flat = [np.concatenate([tree[path].ravel() for path in tree]) for tree in deltas]
    size = flat[0].size
    trimmed = []
    for vector in flat:
        threshold = sorted(abs(vector))[size - int(size * density) - 1]  # kthvalue counts from one
        trimmed.append([x if abs(x) >= threshold else 0.0 for x in vector])
    signs = [np.sign(sum(column)) for column in zip(*trimmed, strict=True)]
    majority = np.sign(sum(signs))
    merged = []
    for column, sign in zip(zip(*trimmed, strict=True), signs, strict=True):
        sign = majority if sign == 0 else sign
        agreeing = [x for x in column if (x > 0 if sign > 0 else x < 0)]
        merged.append(scale * sum(agreeing) / (max(len(agreeing), 1) if average else 1))
    leaves, start = {}, 0
    for path, leaf in deltas[0].items():
        leaves[path] = np.reshape(merged[start : start + leaf.size], leaf.shape)
        start += leaf.size
    return leaves


def check(found, expected):
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-13, atol=1e-15, err_msg=path)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.7])
def test_the_paper(density, sign, levels):
    deltas = [{path: sign * leaf for path, leaf in tree.items()} for tree in draw(4, levels=levels)]
    check(merge(deltas, preset="paper", density=density), merge_by_hand(deltas, density, 1.0, average=True))


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_fusionbench(sign, levels):
    deltas = [{path: sign * leaf for path, leaf in tree.items()} for tree in draw(3, levels=levels)]
    check(merge(deltas, preset="fusionbench"), merge_by_hand(deltas, 0.2, 0.3, average=False))


def test_a_vote_without_any_majority_goes_to_the_negative():
    deltas = [{"a": np.array([1.0, 2.0, -2.0])}, {"a": np.array([-1.0, 2.0, -2.0])}]
    expected = merge_by_hand(deltas, 0.9, 1.0, average=True)
    check(merge(deltas, preset="paper", density=0.9), expected)
    assert expected["a"][0] == -1


@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.8])
def test_peft(density, vote):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("peft.utils.merge_utils")
    deltas, weight = draw(4), (0.7, -0.2, 0.5, 1.0)
    found = merge(deltas, preset="peft", weight=weight, density=density, vote=vote)
    for path in SHAPES:
        tensors = [torch.from_numpy(tree[path]) for tree in deltas]
        method = {"sum": "total", "count": "frequency"}[vote]
        expected = peer.ties(tensors, torch.tensor(weight, dtype=torch.float64), density, method)
        np.testing.assert_allclose(found[path], expected.numpy(), rtol=1e-13, atol=1e-15, err_msg=path)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_of_peft_with_the_same_draws(name, monkeypatch):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("peft.utils.merge_utils")
    deltas, weight = draw(3), (0.7, -0.2, 0.5)
    base = {path: np.zeros_like(leaf) for path, leaf in deltas[0].items()}
    options = dict(preset="peft", density=0.4, seed=3)
    found = merge_trees(METHODS[name], deltas, base, weight=weight, **options)
    alone = [merge_trees(METHODS[name], deltas, base, weight=tuple(np.eye(3)[k].tolist()), **options) for k in range(3)]
    for path in SHAPES:
        kept = (torch.from_numpy(tree[path] != 0) for tree in alone)

        def bernoulli(odds, kept=kept):
            return next(kept).to(odds.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        tensors = [torch.from_numpy(tree[path]) for tree in deltas]
        expected = getattr(peer, name)(tensors, torch.tensor(weight, dtype=torch.float64), 0.4)
        np.testing.assert_allclose(found[path], expected.numpy(), rtol=1e-13, atol=1e-15, err_msg=path)


def test_a_threshold_for_the_model_takes_from_the_larger_leaf():
    deltas = [{"large": np.arange(1.0, 11), "small": 0.01 * np.arange(1.0, 11)}]
    by_leaf = merge(deltas, density=0.5)
    by_model = merge(deltas, density=0.5, scope="model")
    assert {path: np.count_nonzero(leaf) for path, leaf in by_leaf.items()} == {"large": 5, "small": 5}
    assert {path: np.count_nonzero(leaf) for path, leaf in by_model.items()} == {"large": 10, "small": 0}
    by_model = merge(deltas, density=0.6, scope="model")
    np.testing.assert_array_equal(by_model["small"] != 0, np.arange(10) >= 8)
    assert sum(np.count_nonzero(leaf) for leaf in merge(draw(1), density=0.37, scope="model").values()) == math.floor(
        0.37 * sum(math.prod(shape) for shape in SHAPES.values())
    )


def test_unknown_conventions_are_named():
    with pytest.raises(UnknownNameError, match="fusionbench"):
        merge(draw(2), preset="fusion_bench")
    with pytest.raises(UnknownNameError, match="leaf, model"):
        merge(draw(2), scope="tensor")
    with pytest.raises(ConfigError, match="density"):
        merge(draw(2), preset="fusionbench", density=20)
