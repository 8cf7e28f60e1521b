"""Elements that a gradient can move: every group of a spec as free numbers around the identity.

A group's numbers ("latents") make two matrices, one for the plain and one for the dual side of its axes. Rotations
are Cayley maps of a skew matrix and maps inside heads `I + Z`, so both stay what they are; orders are relaxed, by
Sinkhorn's iteration or by letting the gradient straight through the assignment, and hard again at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.assignment import solve_assignments
from jaxtune.align.sinkhorn import sinkhorn
from jaxtune.errors import unknown_name
from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.groups import Group
from jaxtune.symmetry.linear import fix_ones
from jaxtune.symmetry.rotary import join_planes
from jaxtune.symmetry.spec import Axis, Spec

ORDERS = ("held", "straight_through", "sinkhorn")
ORDER_KINDS = ("permutation", "signed_permutation", "scaled_permutation")
SMOOTH_KINDS = ("orthogonal", "centred_orthogonal", "general_linear", "rotary")
# Share of a unit that the start leaves where it is, and how far the gradient must pull before two units swap.
START_SHARE = 0.95
START_MARGIN = 0.1
NOISE = 1e-3  # no two latents of an order are equal, so that none is blind to its sign
SINKHORN_ITERATIONS = 20

Latents = Mapping[str, Mapping[str, jax.Array]]
Orders = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which groups are free, and who owns which axis; hashable, so that it can be a static argument of `jit`.

    Attributes:
        groups: All groups that are free, parents first.
        modes: For each, "smooth", "straight_through" or "sinkhorn".
        counts: For each, the number of units of its parent, or None.
        axes: Path -> owner of each axis, None where nothing free acts, and the axis of the owner's parent.
        temperature: Of Sinkhorn's iteration.
    """

    groups: tuple[Group, ...]
    modes: tuple[str, ...]
    counts: tuple[int | None, ...]
    axes: tuple[tuple[str, tuple[tuple[int, Axis, int | None], ...]], ...]
    temperature: float

    @property
    def members(self) -> list[tuple[Group, str, int | None]]:
        """(group, mode, count) of each."""
        return list(zip(self.groups, self.modes, self.counts, strict=True))

    @property
    def steps_alone(self) -> bool:
        """Whether assignments are to be solved before every step."""
        return "straight_through" in self.modes


def make_plan(spec: Spec, *, orders: str, temperature: float = 1.0) -> Plan:
    """Frees every group of a spec that numbers can move.

    Args:
        spec: Symmetry of both networks.
        orders: "held": orders stay as they are. "straight_through", "sinkhorn": they are free too; signs of rotary
            planes are not, nor is the order of heads, experts or queries, whose units have bases of their own: between
            the heads of two networks there is no way that is half of each.
        temperature: Of Sinkhorn's iteration.

    Raises:
        UnknownNameError: another value of `orders`.
    """
    if orders not in ORDERS:
        raise unknown_name("orders", orders, ORDERS)
    parents = {group.parent for group in spec.groups.values() if spec.groups[group.name].kind in SMOOTH_KINDS}

    def mode_of(group):
        if group.kind in SMOOTH_KINDS:
            return "smooth"
        return orders if group.kind in ORDER_KINDS and group.name not in parents else "held"

    free = sorted((g for g in spec.groups.values() if mode_of(g) != "held"), key=lambda g: g.parent is not None)
    names = {group.name for group in free}

    def moves(path):
        owners = [axis.group if axis else None for axis in spec.axes[path]]
        found = []
        for position, axis in enumerate(spec.axes[path]):
            if axis is not None and axis.group in names:
                parent = spec.groups[axis.group].parent
                found.append((position, axis, None if parent is None else owners.index(parent)))
        return tuple(sorted(found, key=lambda entry: entry[2] is not None))

    return Plan(
        groups=tuple(free),
        modes=tuple(mode_of(group) for group in free),
        counts=tuple(spec.count_of(group.name) for group in free),
        axes=tuple((path, moves(path)) for path in spec.axes),
        temperature=temperature,
    )


def start_latents(key: jax.Array, plan: Plan) -> dict[str, dict[str, jax.Array]]:
    """Latents of the identity; of orders, as near to it as a relaxation is."""
    latents = {}
    for group, mode, count in plan.members:
        lead = () if count is None else (count,)
        n = group.size
        if group.kind in ("orthogonal", "centred_orthogonal", "general_linear"):
            inner = n - 1 if group.kind == "centred_orthogonal" else n
            latents[group.name] = {"map": jnp.zeros((*lead, inner, inner))}
        elif group.kind == "rotary":
            latents[group.name] = {"planes": jnp.zeros((*lead, 2, n // 2))}
        else:
            margin = START_MARGIN
            if mode == "sinkhorn":  # the softmax of one such score among n - 1 zeros has the share wanted
                margin = plan.temperature * (np.log(max(n - 1, 1)) + np.log(START_SHARE / (1 - START_SHARE)))
            noise = NOISE * jax.random.normal(named_key(key, "noise", group.name), (*lead, n, n))
            latents[group.name] = {"scores": np.float32(margin) * jnp.broadcast_to(jnp.eye(n), noise.shape) + noise}
            if group.kind == "scaled_permutation":
                latents[group.name]["log_scales"] = jnp.zeros((*lead, n))
    return latents


def solve_orders(plan: Plan, latents: Latents) -> dict[str, np.ndarray]:
    """The hard order of every free order: int32[n] or int32[parent, n]. Outside `jit`."""
    orders = {}
    for group, mode, _ in plan.members:
        if mode != "smooth":
            scores = np.asarray(latents[group.name]["scores"], np.float64)
            scores = np.abs(scores) if group.kind == "signed_permutation" else scores
            if mode == "sinkhorn":
                scores = np.asarray(sinkhorn(jnp.asarray(scores / plan.temperature, np.float32), num_iterations=100))
            orders[group.name] = solve_assignments(scores)
    return orders


def move_leaves(plan: Plan, latents: Latents, orders: Orders, leaves: Mapping[str, Any], *, is_hard: bool) -> dict:
    """A flat tree, moved by the element that the latents stand for; differentiable in them.

    Args:
        plan, latents: See above.
        orders: What `solve_orders` says of these latents, or of those a few steps ago.
        leaves: Path -> leaf, float32.
        is_hard: Whether orders are those of `orders` alone.
    """
    sides = {
        group.name: _sides(plan, group, mode, latents[group.name], orders.get(group.name), is_hard)
        for group, mode, _ in plan.members
    }
    kinds = {group.name: group.kind for group in plan.groups}
    moved = dict(leaves)
    for path, moves in plan.axes:
        leaf = leaves[path]
        for position, axis, parent in moves:
            side = sides[axis.group]["order" if axis.order_only else "dual" if axis.dual else "plain"]
            act = _turn_planes if kinds[axis.group] == "rotary" else contract
            leaf = act(side, leaf, position, parent)
        moved[path] = leaf
    return moved


def element_of(plan: Plan, spec: Spec, latents: Latents, orders: Orders) -> dict[str, Any]:
    """The hard element in float64, with identities where nothing is free."""
    element = elements.identity(spec)
    for group, _, _ in plan.members:
        numbers = {name: np.asarray(values, np.float64) for name, values in latents[group.name].items()}
        if group.kind in ("orthogonal", "centred_orthogonal"):
            element[group.name] = np.asarray(_rotation(np, group, numbers["map"]))
        elif group.kind == "general_linear":
            element[group.name] = np.eye(group.size) + numbers["map"]
        elif group.kind == "rotary":
            element[group.name] = join_planes(np.exp(numbers["planes"][..., 0, :] + 1j * numbers["planes"][..., 1, :]))
        else:
            order = np.asarray(orders[group.name], np.int32)
            if group.kind == "permutation":
                element[group.name] = order
                continue
            if group.kind == "signed_permutation":
                chosen = np.take_along_axis(numbers["scores"], order[..., None].astype(np.intp), axis=-1)[..., 0]
                factors = np.where(chosen < 0, -1.0, 1.0)
            else:
                factors = np.exp(numbers["log_scales"])
            element[group.name] = np.stack([order.astype(np.float64), factors], axis=-2)
    return element


def residual_of(moved: Mapping[str, Any], target: Mapping[str, Any], matched: tuple[str, ...]) -> jax.Array:
    """`|target - moved|² / (|target|² + |moved|²)` over the matched leaves: 0 where they agree, 1 where unrelated."""
    apart = sum(jnp.sum((target[path] - moved[path]) ** 2) for path in matched)
    whole = sum(jnp.sum(target[path] ** 2) + jnp.sum(moved[path] ** 2) for path in matched)
    return apart / jnp.maximum(whole, np.finfo(np.float32).tiny)


def _sides(plan, group, mode, latents, order, is_hard):
    """{"plain", "dual", "order"}: what axes are contracted with, [source unit, target unit]."""
    if group.kind in ("orthogonal", "centred_orthogonal"):
        rotation = _rotation(jnp, group, latents["map"])
        return {"plain": rotation, "dual": rotation}
    if group.kind == "general_linear":
        plain = jnp.broadcast_to(jnp.eye(group.size), latents["map"].shape) + latents["map"]
        return {"plain": plain, "dual": jnp.swapaxes(jnp.linalg.inv(plain), -1, -2)}
    if group.kind == "rotary":
        log_modulus, phase = latents["planes"][..., 0, :], latents["planes"][..., 1, :]
        return {"plain": (log_modulus, phase), "dual": (-log_modulus, phase)}
    scores = latents["scores"]
    is_signed = group.kind == "signed_permutation"
    likely = jnp.abs(scores) if is_signed else scores
    chosen = jax.nn.one_hot(order, group.size)  # [target unit, source unit]
    if is_hard or mode == "straight_through":
        order_only = plain = chosen
        if is_signed:
            plain = chosen * jnp.where(jnp.sum(chosen * scores, axis=-1, keepdims=True) < 0, -1.0, 1.0)
        if not is_hard:
            plain = plain + scores - jax.lax.stop_gradient(scores)
            order_only = order_only + likely - jax.lax.stop_gradient(likely)
    else:
        order_only = sinkhorn(likely / np.float32(plan.temperature), num_iterations=SINKHORN_ITERATIONS)
        plain = order_only * jnp.tanh(scores / np.float32(plan.temperature)) if is_signed else order_only
    dual = plain
    if group.kind == "scaled_permutation":
        scales = jnp.exp(latents["log_scales"])[..., :, None]
        plain, dual = plain * scales, dual / scales
    return {name: jnp.swapaxes(m, -1, -2) for name, m in (("plain", plain), ("dual", dual), ("order", order_only))}


def _rotation(xp, group, numbers):
    """Cayley's map of the skew part, within the plane that the ones vector is orthogonal to where it must stay."""
    skew = (numbers - xp.swapaxes(numbers, -1, -2)) / 2
    eye = xp.broadcast_to(xp.eye(skew.shape[-1], dtype=skew.dtype), skew.shape)
    inner = xp.linalg.solve(eye - skew, eye + skew)
    if group.kind == "orthogonal":
        return inner
    basis = xp.asarray(fix_ones(group.size)[1:].astype(skew.dtype))  # orthonormal rows, all orthogonal to the ones
    whole = basis.T @ inner @ basis
    return whole + xp.full(whole.shape, 1 / group.size, skew.dtype)


def contract(matrix: jax.Array, leaf: jax.Array, axis: int, parent_axis: int | None) -> jax.Array:
    """`sum_i leaf[.., i, ..] matrix[i, j]` along one axis; inside parents, a matrix for each.

    Shapes:
        matrix: float[n, m], or float[parent, n, m]; leaf: float[..., n, ...]; result: float[..., m, ...].
    """
    letters = "abcdefgh"[: leaf.ndim]
    inner = letters[axis] + "z"
    of_matrix = inner if parent_axis is None else letters[parent_axis] + inner
    formula = f"{letters},{of_matrix}->{letters.replace(letters[axis], 'z')}"
    return jnp.einsum(formula, leaf, matrix, precision=jax.lax.Precision.HIGHEST)


def _turn_planes(numbers, leaf, axis, parent_axis):
    log_modulus, phase = numbers
    shape = [1] * leaf.ndim
    shape[axis] = log_modulus.shape[-1]
    if parent_axis is not None:
        shape[parent_axis] = leaf.shape[parent_axis]
        if parent_axis > axis:
            log_modulus, phase = log_modulus.T, phase.T
    modulus, phase = jnp.exp(log_modulus).reshape(shape), phase.reshape(shape)
    x, y = jnp.split(leaf, 2, axis=axis)
    re, im = modulus * jnp.cos(phase), modulus * jnp.sin(phase)
    return jnp.concatenate([x * re - y * im, x * im + y * re], axis=axis)
