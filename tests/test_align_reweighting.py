"""Leaves that count by their own agreement, on planted truth with some layers replaced by noise."""

import jax
import numpy as np
import pytest
from toys import add_noise, share_recovered, toy_transformer

from jaxtune import symmetry, tree
from jaxtune.align.weights import match_weights

KEY = jax.random.key(0)
SIZES = {"depth": 4}


def spoilt_pair(seed, noise, replaced):
    """(spec, target, source, planted): a moved and noisy copy, some of whose blocks are another network's."""
    spec, source = toy_transformer(seed, **SIZES)
    planted = symmetry.random(jax.random.key(seed), spec)
    target = add_noise(symmetry.apply(spec, planted, source), noise, 5)
    other = toy_transformer(100 + seed, **SIZES)[1]
    target = tree.map_leaves(lambda path, x, y: y if path.split("/")[0] in replaced else x, target, other)
    return spec, target, source, planted


def recovered(spec, target, source, planted, replaced, weighting):
    found = match_weights(KEY, spec, target, source, head_cost="circuit", weighting=weighting)
    live = {name: value for name, value in found.element.items() if name.split("/")[0] not in replaced}
    return share_recovered(spec, live, planted)


def test_with_most_layers_replaced_the_stream_is_found_where_equal_weights_lose_it():
    replaced = ("block_0", "block_1", "block_2")
    shares = {"unit": [], "agreement": []}
    for seed in range(4):
        pair = spoilt_pair(seed, 0.5, replaced)
        for weighting in shares:
            shares[weighting].append(recovered(*pair, replaced, weighting)["stream"])
    assert np.mean(shares["agreement"]) == 1.0
    assert np.mean(shares["unit"]) < 0.9


@pytest.mark.parametrize("replaced", [(), ("block_1", "block_2")])
def test_where_equal_weights_suffice_they_lose_nothing(replaced):
    pair = spoilt_pair(0, 0.5, replaced)
    shares = recovered(*pair, replaced, "agreement")
    assert shares["stream"] == shares["head"] == shares["hidden"] == 1.0


def test_every_round_climbs_under_its_own_weights_and_the_report_is_under_the_first():
    spec, target, source, _ = spoilt_pair(1, 1.0, ("block_0", "block_1", "block_2"))
    unit = match_weights(KEY, spec, target, source, weighting="unit")
    found = match_weights(KEY, spec, target, source, weighting="agreement")
    assert unit.reweighted == ()
    assert 1 <= len(found.reweighted) <= 5
    for history in found.reweighted:
        assert list(history) == sorted(history)
    assert found.history == unit.history
    moved, cosines = tree.flatten(symmetry.apply(spec, found.element, source)), 0.0
    for path, leaf in tree.flatten(target).items():
        if path not in spec.unmatched:
            cosines += np.vdot(leaf, moved[path]) / np.linalg.norm(leaf) / np.linalg.norm(moved[path])
    assert found.objective == pytest.approx(cosines, rel=1e-5)
