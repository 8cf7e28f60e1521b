"""Groups of heads with queries and maps of any kind inside; mixtures of experts: planted, under noise, never worse."""

import itertools

import jax
import numpy as np
import pytest
from toy_decoders import INSIDE, run_decoder, some_tokens, toy_decoder
from toys import add_noise

from jaxtune import symmetry, tree
from jaxtune.align.blocks import solve_block
from jaxtune.align.circuits import circuit_scores
from jaxtune.align.evidence import judge_match, measure_residual
from jaxtune.align.problem import make_problem
from jaxtune.align.weights import match_weights
from jaxtune.errors import SpecError
from jaxtune.symmetry import Group
from jaxtune.transport.trust import weigh_by_trust

KEY = jax.random.key(0)
CASES = {
    "heads, maps": {"inside": "plain", "query": 1, "kv": 4, "biases": True},
    "groups, maps": {"inside": "plain", "query": 2, "kv": 3},
    "groups, rotary": {"inside": "rotary", "query": 3, "kv": 3},
    "groups, rotary, biases": {"inside": "rotary", "query": 2, "kv": 3, "biases": True},
    "one group": {"inside": "rotary", "query": 4, "kv": 1},
    "partial rotary": {"inside": "partial", "query": 2, "kv": 3, "biases": True},
    "normed queries and keys": {"inside": "normed", "query": 2, "kv": 3},
    "orders of values": {"inside": "rotary", "query": 2, "kv": 3, "vo": "permutation"},
    "experts": {"inside": "rotary", "query": 2, "kv": 2, "experts": 6},
}


def plant(name, seed, noise=0.0, **more):
    """(spec, source, element, moved source, target)."""
    spec, source = toy_decoder(seed, **{"width": 48, "hidden": 40, "vocab": 60, **CASES[name], **more})
    element = symmetry.random(jax.random.key(seed), spec)
    moved = symmetry.apply(spec, element, source)
    return spec, source, element, moved, add_noise(moved, noise, seed) if noise else moved


def shares(spec, found, planted):
    """Least share of units whose place was found, over the groups that have orders."""
    orders = {name: symmetry.KINDS[group.kind].order for name, group in spec.groups.items()}
    return min(
        np.mean(order(np.asarray(found[name])) == order(np.asarray(planted[name])))
        for name, order in orders.items()
        if order is not None
    )


def relative_error(wanted, got):
    wanted, got = tree.flatten(wanted), tree.flatten(got)
    return max(np.abs(got[path] - wanted[path]).max() / np.abs(wanted[path]).max() for path in wanted)


@pytest.mark.parametrize("name", CASES)
def test_everything_planted_at_once_is_found_exactly(name):
    for seed in range(2):
        spec, source, planted, _, target = plant(name, seed)
        found = match_weights(KEY, spec, target, source)
        assert relative_error(target, symmetry.apply(spec, found.element, source)) < 1e-5
        assert shares(spec, found.element, planted) == 1
        again = match_weights(KEY, spec, target, symmetry.apply(spec, found.element, source))
        still = symmetry.identity(spec)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), dict(again.element), dict(still))


@pytest.mark.parametrize(("noise", "largest_error"), [(0.1, 0.02), (0.3, 0.06), (1.0, 0.2)])
@pytest.mark.parametrize("name", CASES)
def test_noise_moves_no_unit_and_bends_maps_by_less_than_itself(name, noise, largest_error):
    spec, source, planted, moved, target = plant(name, 3, noise)
    found = match_weights(KEY, spec, target, source)
    assert shares(spec, found.element, planted) == 1
    difference = measure_residual(spec, moved, symmetry.apply(spec, found.element, source))
    assert difference < largest_error
    assert list(found.history) == sorted(found.history)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_twice_the_weights_own_size_of_noise_moves_no_unit(inside, noise):
    """Six heads of sixteen units in four blocks of width 96; TransFusion's loop finds a quarter of the heads there."""
    spec, source = toy_decoder(0, width=96, depth=4, kv=3, query=2, units=16, hidden=192, vocab=64, inside=inside)
    planted = symmetry.random(jax.random.key(0), spec)
    target = add_noise(symmetry.apply(spec, planted, source), noise, 0)
    assert shares(spec, match_weights(KEY, spec, target, source).element, planted) == 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head_cost", ["exact", "spectral"])
def test_between_strangers_nothing_is_lost_and_the_objective_is_what_it_says(name, head_cost):
    spec, source, *_ = plant(name, 0)
    _, target, *_ = plant(name, 1)
    found = match_weights(KEY, spec, target, source, head_cost=head_cost, num_restarts=1, max_sweeps=5)
    assert list(found.history) == sorted(found.history)
    assert found.objective >= found.objective_of_identity
    symmetry.check(spec, found.element)
    moved, own, ours = (tree.flatten(t) for t in (symmetry.apply(spec, found.element, source), source, target))
    by_hand = sum(
        np.vdot(ours[p], moved[p]) - (np.vdot(moved[p], moved[p]) - np.vdot(own[p], own[p])) / 2
        for p in ours
        if p not in spec.unmatched
    )
    assert found.history[-1] == pytest.approx(by_hand, rel=1e-4)
    assert found.objective == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_found_element_carries_the_function(name):
    """float64: what float32 products found must still be an exact symmetry."""
    spec, source, *_ = plant(name, 0)
    _, target, *_ = plant(name, 1)
    found = match_weights(KEY, spec, target, source, max_sweeps=3)
    inside, tokens = CASES[name]["inside"], some_tokens(60)
    wide = tree.map_leaves(lambda _, leaf: leaf.astype(np.float64), source)
    wanted = run_decoder(wide, tokens, inside=inside)
    moved = run_decoder(symmetry.apply(spec, found.element, wide), tokens, inside=inside)
    assert np.abs(moved - wanted).max() < 1e-9 * np.abs(wanted).max()


def test_circuit_scores_of_groups_equal_cosines_of_whole_circuits_in_the_best_order_of_queries():
    """Oracle: every plane's [width, width] complex circuit, every head's W_V W_O, every order of queries."""
    spec, source, *_ = plant("groups, rotary", 0, depth=1)
    _, target, *_ = plant("groups, rotary", 1, depth=1)
    head = "block_0/attn/head"
    scores = circuit_scores(spec, head, symmetry.identity(spec), tree.flatten(target), tree.flatten(source))

    def circuits(params, group):
        leaf = {n: tree.flatten(params)[f"block_0/attn/{n}/kernel"].astype(np.float64) for n in ("q", "k", "v", "out")}
        q, k = (np.stack(np.split(leaf[n][:, group], 2, axis=-1)) for n in "qk")
        q, k = q[0] + 1j * q[1], k[0] + 1j * k[1]  # [width, query, plane], [width, plane]
        qk = np.einsum("xap,yp->axyp", q, k.conj())
        return qk, np.einsum("xu,auy->axy", leaf["v"][:, group], leaf["out"][group])

    for i, j in itertools.product(range(3), repeat=2):
        pairs = list(zip(circuits(target, i), circuits(source, j), strict=True))
        best = max(
            sum(np.vdot(a, b[list(order)]).real / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs)
            for order in itertools.permutations(range(3))
        )
        assert scores[i, j] == pytest.approx(best, abs=1e-5)


def test_a_block_of_heads_gains_what_it_says():
    spec, source, *_ = plant("partial rotary", 0)
    _, target, *_ = plant("partial rotary", 1)
    problem = make_problem(spec, tree.flatten(target), tree.flatten(source), head_cost="exact", weighting="unit")
    element = symmetry.random(jax.random.key(5), spec)
    before = problem.objective(element)
    for block in problem.blocks:
        gain, values = solve_block(problem, block, element, problem.weights)
        element = {**element, **values}
        after = problem.objective(element)
        assert after - before == pytest.approx(gain, abs=1e-4)
        assert gain >= -1e-9
        before = after


def test_experts_are_told_apart_by_their_kernels_where_the_router_says_nothing():
    spec, source, planted, _, target = plant("experts", 0)
    leaves = tree.flatten(target)
    for b in range(2):
        router = leaves[f"block_{b}/mlp/router/kernel"]
        leaves[f"block_{b}/mlp/router/kernel"] = np.random.default_rng(b).normal(size=router.shape).astype(np.float32)
    found = match_weights(KEY, spec, tree.unflatten(leaves), source)
    assert shares(spec, found.element, planted) == 1


def test_experts_that_share_a_large_part_are_told_apart_by_what_differs():
    """Upcycled experts: copies of one MLP that training has moved a little."""
    spec, source, planted, *_ = plant("experts", 0)
    leaves = tree.flatten(source)
    for path in leaves:
        if "/experts/" in path:
            leaves[path] = leaves[path][:1] + 0.1 * leaves[path]
    source = tree.unflatten(leaves)
    target = add_noise(symmetry.apply(spec, planted, source), 0.02, 1)
    found = match_weights(KEY, spec, target, source)
    assert shares(spec, found.element, planted) == 1


def test_a_single_expert_and_experts_without_signs():
    for count in (1, 3):
        spec, source = toy_decoder(0, experts=count)
        groups = [
            Group(g.name, g.size, "permutation", g.parent, g.role) if g.parent and g.role == "hidden" else g
            for g in spec.groups.values()
        ]
        axes = {path: tuple(axis and axis.mark for axis in row) for path, row in spec.axes.items()}
        orders = symmetry.make_spec(groups, axes)
        for some in (spec, orders):
            planted = symmetry.random(jax.random.key(1), some)
            target = symmetry.apply(some, planted, source)
            found = match_weights(KEY, some, target, source)
            assert shares(some, found.element, planted) == 1
            assert relative_error(target, symmetry.apply(some, found.element, source)) < 1e-5


@pytest.mark.parametrize("name", ["groups, rotary", "partial rotary", "normed queries and keys", "experts"])
def test_evidence_trust_and_residual_know_the_kinds(name):
    spec, source, _, _, target = plant(name, 0, 0.1)
    found = match_weights(KEY, spec, target, source)
    evidence = judge_match(KEY, spec, target, source, found.element, num_random=3)
    assert evidence.residual["found"] < 0.2 < 0.5 < evidence.residual["identity"]
    assert evidence.cosine["found"] > 0.98
    assert evidence.lineage.verdict == "related"
    assert not evidence.lineage.is_in_place
    moved, factors = weigh_by_trust(spec, found.element, source, target, source, trust=1.0)
    assert min(factors.values()) > 0.95
    assert tree.flatten(moved).keys() == tree.flatten(source).keys()


def test_kinds_that_have_no_closed_form_are_refused_by_name():
    spec, source, *_ = plant("groups, rotary", 0)
    for role, kind, name in (
        ("vo", "orthogonal", "block_0/attn/vo"),
        ("query", "signed_permutation", "block_0/attn/query"),
    ):
        groups = [Group(g.name, g.size, kind, g.parent, g.role) if g.role == role else g for g in spec.groups.values()]
        axes = {path: tuple(axis and axis.mark for axis in row) for path, row in spec.axes.items()}
        with pytest.raises(SpecError, match=f"group {name}: no matching for kind '{kind}' inside heads"):
            match_weights(KEY, symmetry.make_spec(groups, axes), source, source)
    spec, source, *_ = plant("experts", 0)
    groups = [
        Group(g.name, g.size, "scaled_permutation", g.parent, g.role) if g.parent == "block_0/mlp/expert" else g
        for g in spec.groups.values()
    ]
    axes = {path: tuple(axis and axis.mark for axis in row) for path, row in spec.axes.items()}
    with pytest.raises(SpecError, match="no matching for kind 'scaled_permutation' inside experts"):
        match_weights(KEY, symmetry.make_spec(groups, axes), source, source)
