"""Elements made of free numbers: they act as the hard ones, stay legal wherever the numbers go, and can be hardened."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from small_models import FAST

from jaxtune import symmetry, tree
from jaxtune.align.relaxed import element_of, make_plan, move_leaves, residual_of, solve_orders, start_latents
from jaxtune.align.sinkhorn import sinkhorn
from jaxtune.errors import UnknownNameError
from jaxtune.symmetry import Group, make_spec

KEY = jax.random.key(0)


def every_kind():
    """(spec, flat float32 leaves) with an axis of every kind, plain, dual and order-only, before and behind heads."""
    groups = [
        Group("turn", 6, "orthogonal"),
        Group("centred", 5, "centred_orthogonal"),
        Group("head", 3, role="head"),
        Group("map", 4, "general_linear", parent="head"),
        Group("planes", 4, "rotary", parent="head"),
        Group("order", 5),
        Group("signed", 6, "signed_permutation"),
        Group("scaled", 4, "scaled_permutation"),
        Group("row", 3, role="head"),
        Group("units", 4, parent="row"),
    ]
    axes = {
        "a": ("turn", "head", "map"),
        "b": ("map*", "head", "centred"),
        "c": ("turn*", "head", "planes"),
        "d": ("planes*", "head", "order"),
        "e": ("order", "signed"),
        "f": ("signed*", "scaled"),
        "g": ("scaled*", "signed~"),
        "h": ("row", "units", "turn"),
        "i": (None, "units", "row"),
    }
    spec = make_spec(groups, axes)
    sizes = {group.name: group.size for group in groups}
    draw = np.random.default_rng(0)
    shapes = {path: [2 if owner is None else sizes[owner.strip("*~")] for owner in row] for path, row in axes.items()}
    return spec, {path: draw.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def disturb(latents, size, seed=1):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + (size * draw.normal(size=x.shape)).astype(np.float32), latents)


@pytest.mark.parametrize("orders", ["held", "straight_through", "sinkhorn"])
def test_latents_act_as_the_element_that_they_harden_to(orders):
    """The element's own arithmetic (`symmetry.apply`, gathers and float64) against contractions of latents."""
    spec, leaves = every_kind()
    plan = make_plan(spec, orders=orders)
    latents = disturb(start_latents(KEY, plan), 0.3)
    hard = solve_orders(plan, latents)
    element = element_of(plan, spec, latents, hard)
    symmetry.check(spec, element)
    expected = tree.flatten(symmetry.apply(spec, element, tree.unflatten(leaves)))
    moved = jax.jit(lambda latents: move_leaves(plan, latents, hard, leaves, is_hard=True), compiler_options=FAST)(
        latents
    )
    for path in leaves:
        np.testing.assert_allclose(moved[path], expected[path], atol=2e-5, err_msg=path)
    assert any(np.abs(moved[path] - leaves[path]).max() > 0.1 for path in leaves)


@pytest.mark.parametrize("orders", ["held", "straight_through", "sinkhorn"])
def test_latents_start_at_the_identity(orders):
    spec, leaves = every_kind()
    plan = make_plan(spec, orders=orders)
    latents = start_latents(KEY, plan)
    hard = solve_orders(plan, latents)
    moved = jax.jit(lambda latents: move_leaves(plan, latents, hard, leaves, is_hard=True), compiler_options=FAST)(
        latents
    )
    for path in leaves:
        np.testing.assert_allclose(moved[path], leaves[path], atol=1e-6)


def test_heads_with_bases_of_their_own_are_not_mixed():
    spec, _ = every_kind()
    free = {group.name for group in make_plan(spec, orders="sinkhorn").groups}
    assert free == set(spec.groups) - {"head"}
    assert {group.name for group in make_plan(spec, orders="held").groups} == {"turn", "centred", "map", "planes"}


def test_a_rotation_is_cayleys_map_of_a_skew_matrix():
    """Against the exponential, which agrees to second order, and by its own eigenvalues."""
    spec = make_spec([Group("turn", 5, "orthogonal")], {"a": ("turn",)})
    plan = make_plan(spec, orders="held")
    numbers = 0.02 * np.random.default_rng(3).normal(size=(5, 5))
    latents = {"turn": {"map": jnp.asarray(numbers, jnp.float32)}}
    rotation = element_of(plan, spec, latents, {})["turn"]
    np.testing.assert_allclose(rotation, expm(numbers - numbers.T), atol=1e-4)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(5), atol=1e-12)


def test_gradients_go_through_every_free_group():
    spec, leaves = every_kind()
    for orders in ("straight_through", "sinkhorn"):
        plan = make_plan(spec, orders=orders)
        latents = disturb(start_latents(KEY, plan), 0.1)
        hard = solve_orders(plan, latents)
        target = {path: np.flip(leaf) for path, leaf in leaves.items()}

        def loss(latents, plan=plan, hard=hard, target=target):
            moved = move_leaves(plan, latents, hard, leaves, is_hard=False)
            return residual_of(moved, target, tuple(leaves))

        gradient = jax.jit(jax.grad(loss), compiler_options=FAST)(latents)
        for name, values in gradient.items():
            for part, value in values.items():
                assert np.isfinite(value).all(), (orders, name, part)
                assert np.abs(value).max() > 1e-6, (orders, name, part)


def test_sinkhorn_against_a_plain_loop():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(5, 7))
    rows, columns = draw.uniform(1, 2, 5), draw.uniform(1, 2, 7)
    columns *= rows.sum() / columns.sum()
    plan = np.exp(logits)
    for _ in range(300):
        plan *= (rows / plan.sum(1))[:, None]
        plan *= columns / plan.sum(0)
    found = sinkhorn(
        jnp.asarray(logits, jnp.float32),
        num_iterations=300,
        rows=jnp.asarray(rows, jnp.float32),
        columns=jnp.asarray(columns, jnp.float32),
    )
    np.testing.assert_allclose(found, plan, rtol=1e-4)
    cold = sinkhorn(jnp.asarray(logits[:, :5] / 1e-3, jnp.float32), num_iterations=2000)
    assert np.isfinite(cold).all()  # scores of thousands: exp alone would overflow
    np.testing.assert_allclose(cold.sum(0), 1, atol=1e-5)


def test_unknown_orders_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'sinkhorn'"):
        make_plan(every_kind()[0], orders="sinkhron")
