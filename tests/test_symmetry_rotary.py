"""Numbers and signs of rotary planes, queries inside groups of heads: what they keep, and what breaks without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from group_laws import check_group_laws
from toy_decoders import INSIDE, run_decoder, some_tokens, toy_decoder, turn

from jaxtune import symmetry, tree
from jaxtune.errors import SpecError
from jaxtune.symmetry import Group, rotary

UNITS, LENGTH = 6, 9


def scores_of(q, k):
    """Scores of every query position against every key position, [L, L], of heads [L, n]."""
    positions = np.arange(LENGTH)
    return turn(q[None], positions)[0] @ turn(k[None], positions)[0].T


def project(kind, element, q, k):
    return (symmetry.KINDS[kind].act(element, x, 1, None, dual) for x, dual in ((q, False), (k, True)))


@pytest.fixture
def heads():
    draw = np.random.default_rng(0)
    return draw.normal(size=(LENGTH, UNITS)), draw.normal(size=(LENGTH, UNITS))


@pytest.mark.parametrize("kind", ["rotary", "rotary_signs"])
def test_scores_at_every_distance_stay(kind, heads):
    wanted = scores_of(*heads)
    element = symmetry.KINDS[kind].draw(jax.random.key(0), UNITS, None)
    moved = tuple(project(kind, element, *heads))
    assert np.abs(moved[0] - heads[0]).max() > 0.5
    np.testing.assert_allclose(scores_of(*moved), wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "element"),
    [
        ("permutation", np.array([1, 0, 2, 4, 3, 5])),  # two planes swapped, both halves alike
        ("permutation", np.array([3, 1, 2, 0, 4, 5])),  # the halves of one plane: a reflection, no rotation
        ("signed_permutation", np.stack([np.arange(6.0), [-1, 1, 1, 1, 1, 1]])),  # the sign of half a plane
        ("orthogonal", np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]),
        ("general_linear", np.random.default_rng(1).normal(size=(6, 6))),
    ],
)
def test_whatever_else_leaves_plain_scores_alone_breaks_rotary_ones(kind, element, heads):
    moved = tuple(project(kind, element, *heads))
    np.testing.assert_allclose(moved[0] @ moved[1].T, heads[0] @ heads[1].T, atol=1e-12)
    assert np.abs(scores_of(*moved) - scores_of(*heads)).max() > 0.1


def test_a_number_on_one_side_alone_breaks_scores(heads):
    element = symmetry.KINDS["rotary"].draw(jax.random.key(0), UNITS, None)
    q = symmetry.KINDS["rotary"].act(element, heads[0], 1, None, False)
    k = symmetry.KINDS["rotary"].act(element, heads[1], 1, None, False)  # the plain side twice
    assert np.abs(scores_of(q, k) - scores_of(*heads)).max() > 0.1
    assert np.abs(scores_of(q, heads[1]) - scores_of(*heads)).max() > 0.1


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("query", [1, 3])
def test_group_laws_and_functions_of_grouped_heads(inside, query):
    """Two groups inside the heads own axes of one leaf; a query axis of length 1 is nobody's."""
    spec, params = toy_decoder(inside=inside, query=query, kv=3, biases=inside != "normed", dtype=np.float64)
    check_group_laws(spec, params, rtol=1e-7, atol=1e-10)
    tokens = some_tokens()
    wanted = run_decoder(params, tokens, inside=inside)
    for seed in range(3):
        element = symmetry.random(jax.random.key(seed), spec)
        moved = run_decoder(symmetry.apply(spec, element, params), tokens, inside=inside)
        np.testing.assert_allclose(moved, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


def test_what_no_group_allows_changes_the_function():
    spec, params = toy_decoder(inside="rotary", kv=2, query=2, dtype=np.float64)
    tokens, still = some_tokens(), symmetry.identity(spec)
    wanted = run_decoder(params, tokens)

    def error(edit):
        leaves = tree.flatten(params)
        edit(leaves)
        return np.abs(run_decoder(tree.unflatten(leaves), tokens) - wanted).max() / wanted.std()

    attn = "block_0/attn"

    def across_groups(leaves):  # query 0 of group 0 for query 0 of group 1
        q, out = leaves[f"{attn}/q/kernel"].copy(), leaves[f"{attn}/out/kernel"].copy()
        q[:, [0, 1], 0], out[[0, 1], 0] = q[:, [1, 0], 0], out[[1, 0], 0]
        leaves |= {f"{attn}/q/kernel": q, f"{attn}/out/kernel": out}

    def queries_alone(leaves):  # without their rows of the output
        leaves[f"{attn}/q/kernel"] = leaves[f"{attn}/q/kernel"][:, :, ::-1]

    def planes_swapped(leaves):
        order = np.array([1, 0, 2, 3, 5, 4, 6, 7])
        leaves |= {f"{attn}/{x}/kernel": leaves[f"{attn}/{x}/kernel"][..., order] for x in "qk"}

    def each_query_its_own(leaves):  # one number for all queries of a group, not one each
        q = leaves[f"{attn}/q/kernel"].copy()
        q[:, 0, 1] = symmetry.KINDS["rotary"].act(
            symmetry.KINDS["rotary"].draw(jax.random.key(1), 8, None), q[:, 0, 1], 1, None, False
        )
        leaves[f"{attn}/q/kernel"] = q

    for edit in (across_groups, queries_alone, planes_swapped, each_query_its_own):
        assert error(edit) > 0.01, edit
    # A sign of the stream beside a gain: order alone moves the gain.
    signs = {**still, "stream": np.stack([np.arange(32.0), np.where(np.arange(32) % 2, -1.0, 1.0)])}
    assert error(lambda leaves: leaves.update(tree.flatten(symmetry.apply(spec, signs, params)))) < 1e-9
    assert error(lambda leaves: leaves.update({"final_norm/scale": leaves["final_norm/scale"][::-1]})) > 0.01


def test_signs_alone_pass_through_a_norm_with_a_gain():
    spec, params = toy_decoder(inside="normed", dtype=np.float64)
    groups = [Group(g.name, g.size, "rotary", g.parent, g.role) if g.role == "qk" else g for g in spec.groups.values()]
    axes = {path: tuple(axis and axis.mark for axis in row) for path, row in spec.axes.items()}
    too_much = symmetry.make_spec(groups, axes)
    element = {**symmetry.identity(too_much), **{
        name: symmetry.KINDS["rotary"].draw(jax.random.key(0), 8, 2) for name in too_much.groups if name.endswith("qk")
    }}  # fmt: skip
    tokens = some_tokens()
    wanted = run_decoder(params, tokens, inside="normed")
    moved = run_decoder(symmetry.apply(too_much, element, params), tokens, inside="normed")
    assert np.abs(moved - wanted).max() > 0.01 * wanted.std()


@pytest.mark.parametrize("kind", ["rotary", "rotary_signs"])
def test_jax_leaves_and_low_precision(kind):
    spec, params = toy_decoder(inside="rotary" if kind == "rotary" else "normed")
    element = symmetry.random(jax.random.key(3), spec)
    expected = symmetry.apply(spec, element, params)
    traced = jax.jit(lambda leaves: symmetry.apply(spec, element, leaves))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), traced, expected)
    half = tree.map_leaves(lambda _, x: x.astype(jnp.bfloat16), params)
    wide = tree.map_leaves(lambda _, x: x.astype(np.float32), half)
    moved, once = symmetry.apply(spec, element, half), symmetry.apply(spec, element, wide)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), moved, once)


@pytest.mark.parametrize("kind", ["rotary", "rotary_signs"])
@pytest.mark.parametrize("count", [None, 3])
def test_elements_without_and_with_a_parent(kind, count):
    row = symmetry.KINDS[kind]
    a, b = (row.draw(jax.random.key(n), UNITS, count) for n in range(2))
    parent = None if count is None else np.array([2, 0, 1])
    inner = (2,) if kind == "rotary" else ()
    assert a.shape == (() if count is None else (count,)) + inner + (UNITS // 2,)
    assert a.dtype == np.float64
    for element in (a, b, row.identity(UNITS, count), row.compose(b, a, parent), row.invert(a, parent)):
        assert row.check(element, UNITS, count) is None
    if kind == "rotary":
        assert (np.abs(rotary.planes_of(a)) >= 0.5).all()
        assert (np.abs(rotary.planes_of(a)) <= 2).all()
    wanted = (a if count is None else a[parent]) * b if kind == "rotary_signs" else None
    if wanted is not None:
        np.testing.assert_array_equal(row.compose(b, a, parent), wanted)


def test_illegal_elements_and_specs_are_refused_by_name():
    for inside, cases in {
        "rotary": {
            r"real over imaginary parts.*\[2, 2, 4\], got \[2, 4\]": np.ones((2, 4)),
            "expected finite floats": np.full((2, 2, 4), np.nan),
            "a plane is stretched by 0.0e": np.zeros((2, 2, 4)),
        },
        "normed": {
            r"one sign a plane, of shape \[2, 4\], got \[2, 8\]": np.ones((2, 8)),
            "expected signs": np.full((2, 4), 0.5),
        },
    }.items():
        spec, _ = toy_decoder(inside=inside)
        for complaint, value in cases.items():
            with pytest.raises(SpecError, match=f"block_0/attn/qk: .*{complaint}"):
                symmetry.check(spec, {**symmetry.identity(spec), "block_0/attn/qk": value})
    with pytest.raises(SpecError, match="asks for an order, which rotary has not"):
        symmetry.make_spec([Group("qk", 4, "rotary")], {"q": ("qk~",)})
    odd = symmetry.make_spec([Group("qk", 5, "rotary")], {"q": ("qk",)})
    with pytest.raises(SpecError, match="an axis of 5 entries has no rotary planes"):
        symmetry.identity(odd)


def test_experts_move_with_their_router_and_their_units():
    spec, params = toy_decoder(experts=5, dtype=np.float64)
    check_group_laws(spec, params, rtol=1e-7, atol=1e-10)
    tokens = some_tokens()
    wanted = run_decoder(params, tokens)
    moved = run_decoder(symmetry.apply(spec, symmetry.random(jax.random.key(1), spec), params), tokens)
    np.testing.assert_allclose(moved, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())
    leaves = tree.flatten(params)
    leaves["block_0/mlp/router/kernel"] = leaves["block_0/mlp/router/kernel"][:, ::-1]
    assert np.abs(run_decoder(tree.unflatten(leaves), tokens) - wanted).max() > 0.01 * wanted.std()
