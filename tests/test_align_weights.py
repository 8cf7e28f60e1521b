"""Weight matching: planted elements, laws of the search, and independent oracles for its scores."""

import jax
import numpy as np
import pytest
from toys import add_noise, residual_mlp, share_recovered, toy_transformer

from jaxtune import symmetry, tree
from jaxtune.align import products, weights
from jaxtune.align.assignment import solve_assignments
from jaxtune.align.circuits import circuit_scores
from jaxtune.align.heads import exact_scores, head_spectra, inside_scores, spectral_scores
from jaxtune.align.problem import make_problem
from jaxtune.align.products import leaf_product, unit_scores
from jaxtune.align.weights import HEAD_COSTS, match_weights
from jaxtune.errors import NonFiniteError, TreeMismatchError, UnknownNameError
from jaxtune.symmetry import canonical

KEY = jax.random.key(0)


def planted_pair(seed, noise=0.0, roles=None, **sizes):
    """(spec, target, source, element): the target is the source moved by an element of the named roles."""
    spec, source = toy_transformer(seed, **sizes)
    element, still = symmetry.random(jax.random.key(100 + seed), spec), symmetry.identity(spec)
    if roles:
        element = {n: element[n] if spec.groups[n].role in roles else still[n] for n in element}
    return spec, add_noise(symmetry.apply(spec, element, source), noise, seed), source, element


@pytest.mark.parametrize("head_cost", HEAD_COSTS)
@pytest.mark.parametrize("roles", [["stream"], ["hidden"], ["head"], ["qk"], ["vo"], None], ids=str)
def test_a_planted_element_is_found_exactly(head_cost, roles):
    spec, target, source, planted = planted_pair(0, roles=roles)
    found = match_weights(KEY, spec, target, source, head_cost=head_cost)
    assert found.is_converged
    jax.tree.map(np.testing.assert_array_equal, found.element, planted)
    jax.tree.map(np.testing.assert_array_equal, symmetry.apply(spec, found.element, source), target)


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("head_cost", ["exact", "circuit"])
def test_a_planted_element_is_found_under_noise(noise, head_cost):
    """The bar: all heads and the whole stream at twice the weights' own deviation (width 96, 6 heads)."""
    sizes = {"width": 96, "depth": 4, "heads": 6, "hidden": 192}
    for seed in range(3):
        spec, target, source, planted = planted_pair(seed, noise=noise, **sizes)
        found = match_weights(KEY, spec, target, source, head_cost=head_cost)
        shares = share_recovered(spec, found.element, planted)
        assert shares["stream"] == shares["head"] == shares["hidden"] == 1.0, (seed, shares)


@pytest.mark.parametrize("width", [30, 50])
def test_a_residual_mlp_gives_up_its_planted_permutation(width):
    """The setting in which plain coordinate descent finds 10 of 100: here all of 100."""
    for seed in range(100):
        spec, source = residual_mlp(seed, width)
        planted = symmetry.random(jax.random.key(seed), spec)
        found = match_weights(KEY, spec, symmetry.apply(spec, planted, source), source)
        jax.tree.map(np.testing.assert_array_equal, found.element, planted)


@pytest.mark.parametrize("head_cost", HEAD_COSTS)
def test_the_objective_never_falls_and_is_what_it_says(head_cost):
    """On unrelated networks, where the search has something to lose."""
    spec, target = toy_transformer(1)
    _, source = toy_transformer(2)
    found = match_weights(KEY, spec, target, source, head_cost=head_cost, num_restarts=2)
    assert list(found.history) == sorted(found.history)
    moved = tree.flatten(symmetry.apply(spec, found.element, source))
    plain = sum(
        float(np.vdot(leaf.astype(np.float64), moved[path]))
        for path, leaf in tree.flatten(target).items()
        if path not in spec.unmatched
    )
    assert found.objective == pytest.approx(plain, rel=1e-5)
    assert found.history[-1] == pytest.approx(plain, rel=1e-5)
    assert found.objective == max(found.objectives) >= found.objective_of_identity
    assert len(found.objectives) >= 3


def test_matching_again_finds_nothing_more():
    spec, target = toy_transformer(1)
    _, source = toy_transformer(2)
    first = match_weights(KEY, spec, target, source)
    again = match_weights(KEY, spec, target, symmetry.apply(spec, first.element, source))
    assert again.objective == pytest.approx(first.objective, rel=0.02)
    planted = planted_pair(3, noise=0.3)
    found = match_weights(KEY, planted[0], planted[1], planted[2]).element
    settled = match_weights(KEY, planted[0], planted[1], symmetry.apply(planted[0], found, planted[2])).element
    jax.tree.map(np.testing.assert_array_equal, settled, symmetry.identity(planted[0]))


@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0])
def test_the_whole_group_is_found_under_noise(noise):
    """Folded weights moved by rotations and in-head maps, then noise on every folded leaf."""
    spec, source = toy_transformer(0, width=64, depth=3, heads=4, hidden=128)
    whole, folded = canonical.canonical_spec(spec), canonical.fold(spec, source)
    planted = symmetry.random(jax.random.key(11), whole)
    target = add_noise(symmetry.apply(whole, planted, folded), noise, 5)
    found = match_weights(KEY, whole, target, folded, head_cost="circuit", weighting="unit")
    assert list(found.history) == sorted(found.history)
    shares = share_recovered(whole, {n: x for n, x in found.element.items() if x.ndim == 1}, planted)
    assert shares["head"] == 1.0
    assert shares["hidden"] > (0.99 if noise < 1 else 0.9)
    angle = np.linalg.norm(found.element["stream"] - planted["stream"]) / np.sqrt(64)
    assert angle < 0.5 * noise, angle


def test_swapping_source_and_target_inverts_and_triples_close():
    spec, a = toy_transformer(4)
    to_b, to_c = (symmetry.random(jax.random.key(n), spec) for n in (7, 8))
    b, c = (add_noise(symmetry.apply(spec, g, a), 0.2, n) for n, g in enumerate((to_b, to_c)))

    def match(target, source):
        return match_weights(KEY, spec, target, source).element

    jax.tree.map(np.testing.assert_array_equal, match(a, b), symmetry.invert(spec, match(b, a)))
    through_b = symmetry.compose(spec, match(c, b), match(b, a))
    jax.tree.map(np.testing.assert_array_equal, match(c, a), through_b)


def test_moving_the_target_moves_the_answer():
    spec, target, source, _ = planted_pair(5, noise=0.3)
    sigma = symmetry.random(jax.random.key(55), spec)
    moved = match_weights(KEY, spec, symmetry.apply(spec, sigma, target), source).element
    composed = symmetry.compose(spec, sigma, match_weights(KEY, spec, target, source).element)
    jax.tree.map(np.testing.assert_array_equal, moved, composed)


def test_a_newer_release_stays_where_it_is():
    spec, source = toy_transformer(6)
    found = match_weights(KEY, spec, add_noise(source, 0.3, 1), source)
    jax.tree.map(np.testing.assert_array_equal, found.element, symmetry.identity(spec))


def test_the_search_gives_up_when_told_and_says_so():
    spec, target, source, _ = planted_pair(0, noise=3.0)
    assert match_weights(KEY, spec, target, source).num_sweeps > 1
    assert not match_weights(KEY, spec, target, source, max_sweeps=1, tolerance=0.0).is_converged


def test_unit_scores_equal_a_loop_over_moved_leaves():
    spec, source = toy_transformer(0, depth=1)
    _, target = toy_transformer(1, depth=1)
    element = symmetry.random(jax.random.key(2), spec)
    ours, theirs = tree.flatten(target), tree.flatten(source)
    moved = tree.flatten(symmetry.apply(spec, {**element, "stream": np.arange(64)}, source))
    for path, axis in spec.leaves_of("stream"):
        rows = np.moveaxis(ours[path], axis, 0).reshape(64, -1).astype(np.float64)
        columns = np.moveaxis(moved[path], axis, 0).reshape(64, -1)
        scores = unit_scores(spec, element, path, axis, ours[path], theirs[path])
        np.testing.assert_allclose(scores, rows @ columns.T, atol=1e-4, err_msg=path)
        whole = symmetry.apply(spec, element, source)
        product = leaf_product(spec, element, path, ours[path], theirs[path])
        assert product[0] == pytest.approx(np.vdot(ours[path], tree.flatten(whole)[path]), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("stack_bytes", [1 << 25, 5000, 1], ids=["one stack", "several", "none"])
def test_summed_scores_equal_the_sum_of_scores(monkeypatch, stack_bytes):
    spec, source = toy_transformer(0, depth=1)
    _, target = toy_transformer(1, depth=1)
    element = symmetry.random(jax.random.key(2), spec)
    ours, theirs = tree.flatten(target), tree.flatten(source)
    monkeypatch.setattr(products, "STACK_BYTES", stack_bytes)
    for name, group in spec.groups.items():
        if group.parent is None and not spec.children_of(name):
            leaves = [(1 + n, p, a, ours[p], theirs[p]) for n, (p, a) in enumerate(spec.leaves_of(name))]
            parts = [weight * np.asarray(unit_scores(spec, element, *leaf)) for weight, *leaf in leaves]
            np.testing.assert_allclose(
                products.sum_unit_scores(spec, element, leaves), sum(parts), rtol=1e-4, atol=1e-3, err_msg=name
            )
    assert products.sum_unit_scores(spec, element, []) is None


@pytest.mark.parametrize("is_wide", [False, True], ids=["float32", "float64"])
def test_blocks_side_by_side_are_solved_as_one_by_one(monkeypatch, is_wide):
    """To the last bit, and under what the caller has set for his own thread."""
    spec, target = toy_transformer(1)
    _, source = toy_transformer(2)
    spec = canonical.canonical_spec(spec)
    with jax.enable_x64(is_wide):
        pair = [
            canonical.fold(spec, params, dtype=np.float64 if is_wide else np.float32) for params in (target, source)
        ]
        several = match_weights(KEY, spec, *pair, num_restarts=2)
        monkeypatch.setattr(weights, "MAX_UNITS_SIDE_BY_SIDE", 0)
        single = match_weights(KEY, spec, *pair, num_restarts=2)
    assert several.history == single.history
    assert several.objectives == single.objectives
    jax.tree.map(np.testing.assert_array_equal, several.element, single.element)


def test_blocks_taken_together_share_no_leaf():
    for spec, source in (toy_transformer(0), residual_mlp(0, 30)):
        leaves = tree.flatten(source)
        problem = make_problem(spec, leaves, leaves, head_cost="exact", weighting="plain")
        search = weights.Search(problem)
        names, most = list(problem.blocks), 0
        while names:
            taken = search._take(names)
            paths = [path for name in taken for path in problem.blocks[name]]
            assert len(paths) == len(set(paths))
            most = max(most, len(taken))
        assert most > 1


def test_spectra_equal_an_svd_and_are_blind_to_every_basis():
    draw = np.random.default_rng(0)
    kernel = draw.normal(size=(20, 3, 5))
    spectra = head_spectra(kernel, 1, 2)
    for head in range(3):
        np.testing.assert_allclose(spectra[head], np.linalg.svd(kernel[:, head], compute_uv=False), rtol=1e-6)
    left, right = (np.linalg.qr(draw.normal(size=(n, n)))[0] for n in (20, 5))
    np.testing.assert_allclose(head_spectra(np.einsum("ax,xhu,ub->ahb", left, kernel, right), 1, 2), spectra)
    np.testing.assert_allclose(head_spectra(-3 * kernel, 1, 2), 3 * spectra)


def head_setting():
    spec, source = toy_transformer(0, width=24, depth=1, heads=3, hidden=8)
    _, target = toy_transformer(1, width=24, depth=1, heads=3, hidden=8)
    element = symmetry.random(jax.random.key(3), spec)
    return spec, element, tree.flatten(target), tree.flatten(source)


def test_the_spectral_score_is_a_pseudometric():
    spec, _, target, source = head_setting()
    ab = spectral_scores(spec, "block_0/attn/head", target, source)
    ba = spectral_scores(spec, "block_0/attn/head", source, target)
    np.testing.assert_allclose(ab, ba.T)
    assert (ab < 0).all()
    np.testing.assert_allclose(np.diag(spectral_scores(spec, "block_0/attn/head", source, source)), 0, atol=1e-6)
    without = spectral_scores(spec, "block_0/attn/head", target, source, include_output=False)
    assert (without > ab).all()


def test_circuit_scores_equal_cosines_of_the_full_circuits_and_ignore_every_gauge():
    """Oracle: the [width + 1, width] circuits themselves, biases as a last row; the source moved first."""
    spec, element, target, source = head_setting()
    scores = circuit_scores(spec, "block_0/attn/head", element, target, source)

    def circuits(params, order):
        a = {n: params[f"block_0/attn/{n}/kernel"].astype(np.float64) for n in ("q", "k", "v", "out")}
        bias = {n: params[f"block_0/attn/{n}/bias"] for n in ("q", "v")}
        for head in range(3):
            q, v = (np.vstack([a[n][order, head], bias[n][head]]) for n in ("q", "v"))
            yield q @ a["k"][order, head].T, v @ a["out"][head][:, order]

    ours, theirs = list(circuits(target, np.arange(24))), list(circuits(source, element["stream"]))
    for i, j in np.ndindex(3, 3):
        cosines = [
            np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(ours[i], theirs[j], strict=True)
        ]
        assert scores[i, j] == pytest.approx(sum(cosines), abs=1e-5)

    draw = np.random.default_rng(4)
    gauge = draw.normal(size=(3, 8, 8)) + 3 * np.eye(8)
    bent = dict(source)
    for n, matrix in (("q", gauge), ("k", np.linalg.inv(gauge).transpose(0, 2, 1))):
        bent[f"block_0/attn/{n}/kernel"] = np.einsum("dhu,huw->dhw", source[f"block_0/attn/{n}/kernel"], matrix)
    bent["block_0/attn/q/bias"] = np.einsum("hu,huw->hw", source["block_0/attn/q/bias"], gauge)
    bent = {path: leaf.astype(np.float32) for path, leaf in bent.items()}
    np.testing.assert_allclose(circuit_scores(spec, "block_0/attn/head", element, target, bent), scores, atol=1e-4)


def test_exact_scores_equal_an_assignment_per_pair_of_heads():
    spec, element, target, source = head_setting()
    weights = dict.fromkeys((path for path in spec.axes if path not in spec.unmatched), 1.0)
    inside = inside_scores(spec, "block_0/attn/head", element, target, source, weights)
    scores = exact_scores(inside)
    for i, j in np.ndindex(3, 3):
        total = 0.0
        for group, leaves in (("qk", ["q/kernel", "k/kernel", "q/bias"]), ("vo", ["v/kernel", "v/bias", "out/kernel"])):
            table = np.zeros((8, 8))
            for leaf in leaves:
                a, b = target[f"block_0/attn/{leaf}"].astype(np.float64), source[f"block_0/attn/{leaf}"]
                if leaf == "out/kernel":
                    table += a[i] @ b[j][:, element["stream"]].T
                elif leaf.endswith("kernel"):
                    table += a[:, i].T @ b[element["stream"], j]
                else:
                    table += np.outer(a[i], b[j])
            np.testing.assert_allclose(inside[f"block_0/attn/{group}"][i, j], table, atol=1e-4)
            order = solve_assignments(table)
            total += table[np.arange(8), order].sum()
        assert scores[i, j] == pytest.approx(total, rel=1e-5)


def test_bad_input_is_refused_at_the_door():
    spec, params = toy_transformer(0, depth=1)
    narrow = toy_transformer(0, depth=1, width=32)[1]
    with pytest.raises(TreeMismatchError, match="target float32"):
        match_weights(KEY, spec, params, narrow)
    broken = tree.map_leaves(lambda path, x: np.full_like(x, np.nan) if path == "position" else x, params)
    with pytest.raises(NonFiniteError, match="source holds NaN or Inf in 1 leaves:\n  position"):
        match_weights(KEY, spec, params, broken)
    with pytest.raises(UnknownNameError, match="Did you mean 'spectral'"):
        match_weights(KEY, spec, params, params, head_cost="spectrall")
