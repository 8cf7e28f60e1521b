"""Orders with signs and with scales: group laws, dense matrices as oracle, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from group_laws import check_group_laws

from jaxtune import symmetry
from jaxtune.errors import SpecError
from jaxtune.symmetry import Group
from jaxtune.symmetry.monomial import factors_of, order_of

KINDS = ("signed_permutation", "scaled_permutation")
SIZES = {"a": 6, "head": 4, "inside": 3, "b": 5}
AXES = {
    "first": (None, "a"),
    "bias": ("a",),
    "between": ("a*", "b"),
    "normed": ("b~", None),
    "last": ("b*", None),
    "q": ("a*", "head", "inside"),
    "k": ("inside*", "head"),
}


@pytest.fixture(params=KINDS)
def spec(request):
    kind = request.param
    inside = Group("inside", SIZES["inside"], kind, parent="head")
    return symmetry.make_spec([Group("a", 6, kind), Group("head", 4), inside, Group("b", 5, kind)], AXES)


@pytest.fixture
def params():
    draw = np.random.default_rng(0)
    return {p: draw.normal(size=[SIZES[o.strip("*~")] if o else 7 for o in axes]) for p, axes in AXES.items()}


def test_group_laws(spec, params):
    check_group_laws(spec, params, rtol=1e-12, atol=1e-12)


def test_an_element_is_a_matrix_with_one_entry_a_row(spec, params):
    """Oracle: dense matrices M, and their inverse transpose on the dual side."""
    element = symmetry.random(jax.random.key(3), spec)
    moved = symmetry.apply(spec, element, params)
    a, b = (np.diag(element[n][1]) @ np.eye(SIZES[n])[element[n][0].astype(int)] for n in "ab")
    order_of_b = np.eye(5)[element["b"][0].astype(int)]
    np.testing.assert_allclose(moved["first"], params["first"] @ a.T, atol=1e-12)
    np.testing.assert_allclose(moved["bias"], a @ params["bias"], atol=1e-12)
    np.testing.assert_allclose(moved["between"], np.linalg.inv(a).T @ params["between"] @ b.T, atol=1e-12)
    np.testing.assert_allclose(moved["normed"], order_of_b @ params["normed"], atol=1e-12)
    np.testing.assert_allclose(moved["last"], np.linalg.inv(b).T @ params["last"], atol=1e-12)
    for slot, head in enumerate(element["head"]):
        order, factors = order_of(element["inside"][slot]), element["inside"][slot, 1]
        unit_rows = np.linalg.inv(a).T @ params["q"][:, head]
        np.testing.assert_allclose(moved["q"][:, slot], unit_rows[:, order] * factors, atol=1e-12)
        np.testing.assert_allclose(moved["k"][:, slot], params["k"][order, head] / factors, atol=1e-12)
    # What the network sees of a group is the product over its axis.
    np.testing.assert_allclose(moved["first"] @ moved["between"], params["first"] @ params["between"] @ b.T, atol=1e-12)


def test_low_precision_leaves_are_rounded_once_and_traced_ones_move_alike(spec, params):
    element = symmetry.random(jax.random.key(4), spec)
    half = {path: leaf.astype(np.float16) for path, leaf in params.items()}
    wide = {path: leaf.astype(np.float32) for path, leaf in half.items()}
    moved, expected = symmetry.apply(spec, element, half), symmetry.apply(spec, element, wide)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float16)), moved, expected)
    traced = jax.jit(lambda leaves: symmetry.apply(spec, element, leaves))(wide)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), traced, expected)
    on_device = symmetry.apply(spec, element, {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in wide.items()})
    assert {leaf.dtype for leaf in on_device.values()} == {np.dtype(jnp.bfloat16)}


def test_a_permutation_is_the_special_case_without_factors(spec, params):
    plain = [Group(g.name, g.size, "permutation", g.parent) for g in spec.groups.values()]
    orders = symmetry.make_spec(plain, AXES)
    element = symmetry.random(jax.random.key(5), orders)
    lifted = {
        name: value if name == "head" else np.stack([value, np.ones(value.shape)], axis=-2)
        for name, value in element.items()
    }
    moved, expected = symmetry.apply(spec, lifted, params), symmetry.apply(orders, element, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), moved, expected)


def test_signs_are_their_own_inverse_and_scales_are_drawn_around_one(spec):
    element = symmetry.random(jax.random.key(6), spec)["a"]
    if spec.groups["a"].kind == "signed_permutation":
        np.testing.assert_array_equal(factors_of(element, dual=True), factors_of(element, dual=False))
        many = symmetry.KINDS["signed_permutation"].draw(jax.random.key(0), 400, None)
        assert 150 < np.sum(many[1] == 1) < 250
    else:
        assert len(np.unique(element[1])) == 6
        assert ((element[1] >= 0.25) & (element[1] <= 4)).all()


def test_illegal_elements_are_refused(spec):
    identity = symmetry.identity(spec)

    def changed(row, position, value):
        element = identity["a"].copy()
        element[row, position] = value
        return element

    cases = [
        ("shape", identity["a"][0]),
        ("finite floats", changed(1, 0, np.nan)),
        ("finite floats", identity["a"].astype(np.int32)),
        ("whole numbers", changed(0, 1, 0.5)),
        ("not a permutation", changed(0, 1, 3)),
    ]
    if spec.groups["a"].kind == "signed_permutation":
        cases += [("signs, 1 or -1", changed(1, 2, 2.0)), ("signs, 1 or -1", changed(1, 2, 0.0))]
    else:
        cases += [("positive scales", changed(1, 2, -1.0)), ("positive scales", changed(1, 2, 0.0))]
    for complaint, value in cases:
        with pytest.raises(SpecError, match=f"a: .*{complaint}"):
            symmetry.check(spec, {**identity, "a": value})


def test_only_groups_with_an_order_own_axes_that_follow_it_alone():
    with pytest.raises(SpecError, match="a~ asks for an order, which orthogonal has not"):
        symmetry.make_spec([Group("a", 3, "orthogonal")], {"x": ("a~",)})
    marks = symmetry.make_spec([Group("a", 3)], {"x": ("a",), "y": ("a*",), "z": ("a~",)})
    assert [row[0].mark for row in marks.axes.values()] == ["a", "a*", "a~"]
