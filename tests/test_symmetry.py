"""Group laws of the symmetry elements, and specs that refuse what they do not know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import symmetry
from jaxtune.errors import SpecError
from jaxtune.symmetry import Group

WIDTH, HEADS, UNITS, HIDDEN = 6, 4, 3, 5
GROUPS = [
    Group("stream", WIDTH, role="stream"),
    Group("head", HEADS, role="head"),
    Group("qk", UNITS, parent="head", role="qk"),
    Group("vo", UNITS, parent="head", role="vo"),
    Group("hidden", HIDDEN),
]
AXES = {
    "embed": (None, "stream"),
    "q": ("stream", "head", "qk"),
    "k": ("stream", "head", "qk*"),
    "q_bias": ("head", "qk"),
    "v": ("stream", "head", "vo"),
    "out": ("head", "vo*", "stream"),
    "slope": ("head",),
    "up": ("stream", "hidden"),
    "down": ("hidden", "stream"),
    "step": (),
}
SIZES = {"stream": WIDTH, "head": HEADS, "qk": UNITS, "vo": UNITS, "hidden": HIDDEN}


@pytest.fixture
def spec():
    return symmetry.make_spec(GROUPS, AXES, junctions=["stream"])


@pytest.fixture
def params():
    draw = np.random.default_rng(0)
    shapes = {path: [SIZES[o.rstrip("*")] if o else 7 for o in owners] for path, owners in AXES.items()}
    return {path: np.asarray(draw.normal(size=shape)) for path, shape in shapes.items()}


def elements(spec, count=3):
    return [symmetry.random(jax.random.key(n), spec) for n in range(count)]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_identity_changes_nothing(spec, params):
    assert_same(symmetry.apply(spec, symmetry.identity(spec), params), params)


def test_apply_gathers_as_matrices_multiply(spec, params):
    """Oracle: dense permutation matrices P = eye[p], the block matrix of heads and units for q."""
    element = symmetry.random(jax.random.key(3), spec)
    moved = symmetry.apply(spec, element, params)
    stream, hidden = (np.eye(SIZES[name])[element[name]] for name in ("stream", "hidden"))
    np.testing.assert_array_equal(moved["up"], stream @ params["up"] @ hidden.T)
    block = np.zeros((HEADS * UNITS, HEADS * UNITS))
    for slot in range(HEADS):
        for unit in range(UNITS):
            block[slot * UNITS + unit, element["head"][slot] * UNITS + element["qk"][slot, unit]] = 1
    flat = params["q"].reshape(WIDTH, -1)
    np.testing.assert_array_equal(moved["q"].reshape(WIDTH, -1), stream @ flat @ block.T)
    np.testing.assert_array_equal(moved["q_bias"].ravel(), block @ params["q_bias"].ravel())
    np.testing.assert_array_equal(moved["slope"], params["slope"][element["head"]])
    np.testing.assert_array_equal(moved["step"], params["step"])


def test_compose_is_one_after_the_other_and_associative(spec, params):
    a, b, c = elements(spec)
    once = symmetry.apply(spec, symmetry.compose(spec, b, a), params)
    assert_same(once, symmetry.apply(spec, b, symmetry.apply(spec, a, params)))
    left = symmetry.compose(spec, symmetry.compose(spec, c, b), a)
    assert_same(left, symmetry.compose(spec, c, symmetry.compose(spec, b, a)))


def test_invert_undoes_from_both_sides(spec, params):
    (element,) = elements(spec, 1)
    inverse = symmetry.invert(spec, element)
    for pair in ((inverse, element), (element, inverse)):
        assert_same(symmetry.compose(spec, *pair), symmetry.identity(spec))
    assert_same(symmetry.apply(spec, inverse, symmetry.apply(spec, element, params)), params)


def test_apply_is_linear_bit_for_bit_and_keeps_norms(spec, params):
    (element,) = elements(spec, 1)
    other = {path: leaf[::-1].copy() if leaf.ndim else leaf for path, leaf in params.items()}
    total = {path: params[path] + other[path] for path in params}
    moved, moved_other = symmetry.apply(spec, element, params), symmetry.apply(spec, element, other)
    assert_same(symmetry.apply(spec, element, total), {p: moved[p] + moved_other[p] for p in params})
    assert_same(
        {p: np.sort(x, axis=None) for p, x in moved.items()}, {p: np.sort(x, axis=None) for p, x in params.items()}
    )
    for path in params:
        assert np.vdot(moved[path], moved_other[path]) == pytest.approx(np.vdot(params[path], other[path]), rel=1e-12)


def test_the_rank_of_a_low_rank_update_stays_and_its_factors_move_apart(spec):
    (element,) = elements(spec, 1)
    draw = np.random.default_rng(1)
    left, right = draw.normal(size=(WIDTH, 2)), draw.normal(size=(2, HIDDEN))
    up = symmetry.make_spec([GROUPS[0], GROUPS[4]], {"up": ("stream", "hidden")})
    element = {name: element[name] for name in ("stream", "hidden")}
    moved = symmetry.apply(up, element, {"up": left @ right})["up"]
    assert np.linalg.matrix_rank(moved) == 2
    np.testing.assert_allclose(moved, left[element["stream"]] @ right[:, element["hidden"]], atol=1e-12)


def test_apply_runs_under_jit_with_traced_leaves(spec, params):
    (element,) = elements(spec, 1)
    traced = jax.jit(lambda tree: symmetry.apply(spec, element, tree))
    leaves = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in params.items()}
    assert_same(traced(leaves), symmetry.apply(spec, element, {p: np.asarray(x) for p, x in leaves.items()}))


def test_random_elements_depend_on_names_not_on_order(spec):
    shuffled = symmetry.make_spec(GROUPS[::-1], dict(reversed(AXES.items())), junctions=["stream"])
    assert_same(symmetry.random(jax.random.key(5), spec), symmetry.random(jax.random.key(5), shuffled))


def test_an_unknown_a_missing_and_a_misshapen_leaf_are_all_named(spec, params):
    broken = {**params, "extra": np.zeros(2), "up": np.zeros((WIDTH, HIDDEN + 1)), "embed": np.zeros(3)}
    del broken["k"]
    with pytest.raises(SpecError) as caught:
        symmetry.apply(spec, symmetry.identity(spec), broken)
    message = str(caught.value)
    for line in (
        "extra: not in the spec",
        "k: in the spec, missing",
        "up: axis 1 of [6, 6]",
        "embed: the spec has 2 axes",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("groups", "axes", "options", "complaint"),
    [
        (GROUPS[:1], {"a": ("nobody",)}, {}, "no group"),
        (GROUPS[:1], {"a": (None,)}, {}, "owns no axis"),
        (GROUPS[:1], {"a": ("stream", "stream")}, {}, "two axes"),
        (GROUPS[1:3], {"a": ("qk",), "b": ("head", None)}, {}, "lives inside head"),
        ([GROUPS[0], GROUPS[0]], {"a": ("stream",)}, {}, "declared twice"),
        ([Group("g", 2, kind="affine")], {"a": ("g",)}, {}, "unknown kind"),
        (GROUPS[:1], {"a": ("stream",)}, {"unmatched": ["b"]}, "no axes declared"),
        (GROUPS[:1], {"a": ("stream",)}, {"junctions": ["b"]}, "no group"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(groups, axes, options, complaint):
    with pytest.raises(SpecError, match=complaint):
        symmetry.make_spec(groups, axes, **options)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (np.zeros(WIDTH, np.int32), "not a permutation"),
        (np.arange(WIDTH - 1), "shape"),
        (np.arange(WIDTH, dtype=np.float32), "integer"),
    ],
)
def test_an_element_that_is_no_permutation_is_refused(spec, params, value, complaint):
    element = {**symmetry.identity(spec), "stream": value}
    with pytest.raises(SpecError, match=f"stream: .*{complaint}"):
        symmetry.apply(spec, element, params)
    with pytest.raises(SpecError, match="hidden: missing"):
        symmetry.check(spec, {k: v for k, v in symmetry.identity(spec).items() if k != "hidden"})
