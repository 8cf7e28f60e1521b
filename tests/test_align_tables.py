"""Tables kept between visits against the whole products, and TransFusion's loop against itself without shortcuts."""

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from toys import add_noise, toy_transformer

from jaxtune import symmetry, tree
from jaxtune.align import tables
from jaxtune.align.heads import head_leaves, spectral_scores
from jaxtune.align.products import leaf_product, slot_scores, unit_scores
from jaxtune.align.tables import UnitTable
from jaxtune.align.transfusion import match_transfusion
from jaxtune.errors import SpecError
from jaxtune.rng import named_key

KEY = jax.random.key(0)


def unrelated(**sizes):
    spec, target = toy_transformer(1, junctions="each", inside="joint", **sizes)
    return spec, target, toy_transformer(2, junctions="each", inside="joint", **sizes)[1]


@pytest.mark.parametrize("max_kept", [0, 1024])
@pytest.mark.parametrize("name", ["stream_0", "stream_1", "stream_2", "block_0/mlp/hidden"])
def test_a_table_says_what_the_whole_products_say_whatever_moved(name, max_kept, monkeypatch):
    monkeypatch.setattr(tables, "MAX_KEPT_UNITS", max_kept)
    spec, target, source = unrelated(depth=1)
    target, source = tree.flatten(target), tree.flatten(source)
    table, element, draw = UnitTable(spec, name, target, source), symmetry.identity(spec), np.random.default_rng(0)
    paths = [path for path, _ in spec.leaves_of(name)]
    for visit in range(8):
        other = draw.choice([n for n in spec.groups if n != name])
        drawn = symmetry.random(jax.random.key(visit), spec)[other]
        if visit % 2:  # two units change places, in every head where it has heads
            drawn = np.array(element[other])
            drawn[..., [0, 1]] = drawn[..., [1, 0]]
        element[other] = drawn
        used = paths[: visit + 1]
        expected = sum(
            np.asarray(unit_scores(spec, element, path, axis, target[path], source[path]), np.float64)
            for path, axis in spec.leaves_of(name)
            if path in used
        )
        np.testing.assert_allclose(table.scores(element, used), expected, atol=1e-4, err_msg=f"visit {visit}")


def plain_loop(spec, target, source):
    """The repaired loop without the new start: every product whole, every visit made, SciPy for every order."""
    target, source, element, phase = tree.flatten(target), tree.flatten(source), symmetry.identity(spec), "heads"
    blocks = [name for name, group in spec.groups.items() if group.parent is None]
    heads = {name for name in blocks if spec.children_of(name)}

    def solve(score):
        return linear_sum_assignment(score, maximize=True)[1]

    def solve_each(scores):
        return np.stack([solve(score) for score in scores])

    def total(score, order):
        return np.take_along_axis(score, np.asarray(order)[..., None], -1).sum(dtype=np.float64)

    for sweep in range(100):
        progress = head_progress = False
        for index in np.asarray(jax.random.permutation(named_key(KEY, "sweep", sweep), len(blocks))):
            name = blocks[index]
            owned, found = name, solve
            if name in heads and phase == "heads":
                score = spectral_scores(spec, name, target, source)
            elif name in heads:
                owned = spec.children_of(name)[0]
                found = solve_each
                score = sum(
                    np.asarray(slot_scores(spec, element, path, *axes, target[path], source[path]), np.float64)
                    for path, *axes in head_leaves(spec, name)
                    if len(spec.axes[path]) > 2
                )
            else:
                score = sum(
                    np.asarray(unit_scores(spec, element, path, axis, target[path], source[path]))
                    for path, axis in spec.leaves_of(name)
                    if path not in spec.unmatched
                )
            order = found(score)
            gain = total(score, order) - total(score, element[owned])
            if gain > 1e-6 * abs(total(score, order)):
                element[owned], progress = order, True
                head_progress |= name in heads and phase == "heads"
        if phase == "heads" and not head_progress:
            phase = "inside"
        elif not progress:
            return element
    raise AssertionError("no end")


def test_the_loop_finds_what_it_finds_without_any_shortcut():
    spec, target, source = unrelated(width=32, heads=2, hidden=48)
    found = match_transfusion(KEY, spec, target, source, repair_start=False)
    jax.tree.map(np.testing.assert_array_equal, found.element, plain_loop(spec, target, source))


def objective(spec, element, target, source):
    target, source = tree.flatten(target), tree.flatten(source)
    return sum(leaf_product(spec, element, path, target[path], source[path])[0] for path in spec.axes)


def test_the_new_start_needs_fewer_sweeps_and_loses_nothing():
    """Between unrelated networks, over five pairs: half the sweeps for as good an inner product."""
    sweeps, reached = {True: 0, False: 0}, {True: 0.0, False: 0.0}
    for seed in range(5):
        spec, target = toy_transformer(seed, junctions="each", inside="joint")
        source = toy_transformer(50 + seed, junctions="each", inside="joint")[1]
        for start in (True, False):
            found = match_transfusion(KEY, spec, target, source, repair_start=start)
            sweeps[start] += found.num_sweeps
            reached[start] += objective(spec, found.element, target, source)
    assert sweeps[True] < sweeps[False]
    assert reached[True] > 0.98 * reached[False]


def test_where_the_inputs_lead_astray_the_search_begins_where_the_networks_stand():
    spec, source = toy_transformer(6, junctions="each", inside="joint")
    target = add_noise(source, 0.3, 1)
    target["patch"]["kernel"] = np.roll(target["patch"]["kernel"], 1, -1)
    target["position"] = np.roll(target["position"], 1, -1)
    begun = match_transfusion(KEY, spec, target, source, max_sweeps=1)
    assert not begun.is_converged
    jax.tree.map(np.testing.assert_array_equal, begun.element, symmetry.identity(spec))


def test_products_on_the_host_equal_those_on_the_device():
    spec, target, source = unrelated(depth=1)
    element = symmetry.random(KEY, spec)
    for path, ours in tree.flatten(target).items():
        theirs = tree.flatten(source)[path]
        host = leaf_product(spec, element, path, ours, theirs)
        device = leaf_product(spec, element, path, jax.numpy.asarray(ours), jax.numpy.asarray(theirs))
        np.testing.assert_allclose(host, device, rtol=1e-4, atol=1e-3)


def test_groups_that_are_more_than_orders_are_refused():
    params = toy_transformer(0, depth=1)[1]
    turned = symmetry.make_spec(
        [symmetry.Group("stream", 64, "orthogonal", role="stream")], {"w": ("stream", None)}, junctions=["stream"]
    )
    with pytest.raises(SpecError, match=r"orders of units, .* stream \(orthogonal\)"):
        match_transfusion(KEY, turned, {"w": params["head"]["kernel"]}, {"w": params["head"]["kernel"]})
