"""Rotations and invertible maps: group laws in float64, and the products that they must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from group_laws import check_group_laws

from jaxtune import symmetry
from jaxtune.errors import SpecError
from jaxtune.symmetry import Group
from jaxtune.symmetry.linear import fix_ones

WIDTH, HEADS, UNITS, HIDDEN = 6, 4, 3, 5
AXES = {
    "embed": (None, "stream"),
    "q": ("stream", "head", "qk"),
    "k": ("stream", "head", "qk*"),
    "v": ("stream", "head", "vo"),
    "out": ("head", "vo*", "stream"),
    "up": ("stream", "hidden"),
}
SIZES = {"stream": WIDTH, "head": HEADS, "qk": UNITS, "vo": UNITS, "hidden": HIDDEN}


@pytest.fixture(params=["orthogonal", "centred_orthogonal"])
def spec(request):
    groups = [
        Group("stream", WIDTH, request.param, role="stream"),
        Group("head", HEADS, role="head"),
        Group("qk", UNITS, "general_linear", parent="head", role="qk"),
        Group("vo", UNITS, "general_linear", parent="head", role="vo"),
        Group("hidden", HIDDEN),
    ]
    return symmetry.make_spec(groups, AXES, junctions=["stream"])


@pytest.fixture
def params():
    draw = np.random.default_rng(0)
    shapes = {path: [SIZES[o.rstrip("*")] if o else 7 for o in owners] for path, owners in AXES.items()}
    return {path: draw.normal(size=shape) for path, shape in shapes.items()}


def test_group_laws(spec, params):
    check_group_laws(spec, params, rtol=1e-7, atol=1e-10)


def test_circuits_move_with_the_stream_alone(spec, params):
    """W_Q W_K^T and W_V W_O of the head in each slot: no map inside a head shows in them."""
    element = symmetry.random(jax.random.key(1), spec)
    moved = symmetry.apply(spec, element, params)
    rotation = element["stream"]
    for slot, head in enumerate(element["head"]):
        qk = params["q"][:, head] @ params["k"][:, head].T
        vo = params["v"][:, head] @ params["out"][head]
        np.testing.assert_allclose(moved["q"][:, slot] @ moved["k"][:, slot].T, rotation.T @ qk @ rotation, atol=1e-10)
        np.testing.assert_allclose(moved["v"][:, slot] @ moved["out"][slot], rotation.T @ vo @ rotation, atol=1e-10)
    np.testing.assert_allclose(moved["embed"], params["embed"] @ rotation, atol=1e-12)
    np.testing.assert_allclose(moved["up"], (rotation.T @ params["up"])[:, element["hidden"]], atol=1e-12)


def test_a_rotation_keeps_norms_and_the_centred_one_keeps_means(spec, params):
    element = symmetry.random(jax.random.key(2), spec)
    moved = symmetry.apply(spec, element, params)
    np.testing.assert_allclose(np.linalg.norm(moved["embed"], axis=1), np.linalg.norm(params["embed"], axis=1))
    means = np.allclose(moved["embed"].mean(axis=1), params["embed"].mean(axis=1))
    assert means == (spec.groups["stream"].kind == "centred_orthogonal")


def test_low_precision_leaves_are_moved_wide_and_rounded_once(spec, params):
    element = symmetry.random(jax.random.key(3), spec)
    half = {path: leaf.astype(np.float16) for path, leaf in params.items()}
    wide = {path: leaf.astype(np.float32) for path, leaf in half.items()}
    moved, expected = symmetry.apply(spec, element, half), symmetry.apply(spec, element, wide)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float16)), moved, expected)
    traced = jax.jit(lambda tree: symmetry.apply(spec, element, tree))(wide)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), traced, expected)
    for dtype in (jnp.bfloat16, jnp.float16):
        on_device = symmetry.apply(spec, element, {path: jnp.asarray(leaf, dtype) for path, leaf in wide.items()})
        assert {leaf.dtype for leaf in on_device.values()} == {np.dtype(dtype)}


def test_illegal_matrices_are_refused(spec):
    identity = symmetry.identity(spec)
    kind = spec.groups["stream"].kind
    cases = {
        "not orthogonal": {"stream": 2 * np.eye(WIDTH)},
        "shape": {"stream": np.eye(WIDTH - 1)},
        "finite floats": {"stream": np.full((WIDTH, WIDTH), np.nan)},
        "cannot be inverted": {"qk": np.ones((HEADS, UNITS, UNITS))},
    }
    if kind == "centred_orthogonal":
        cases["moves the ones vector"] = {"stream": np.diag([-1.0, 1, 1, 1, 1, 1])}
    for complaint, change in cases.items():
        with pytest.raises(SpecError, match=complaint):
            symmetry.check(spec, {**identity, **change})


def test_fix_ones_is_a_basis_that_begins_with_the_mean():
    basis = fix_ones(7)
    np.testing.assert_allclose(basis @ basis.T, np.eye(7), atol=1e-12)
    np.testing.assert_allclose(basis[0], np.full(7, 7**-0.5))
