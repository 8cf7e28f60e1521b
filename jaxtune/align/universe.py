"""Many models at once: each has an element that brings it into coordinates that all share.

The map from one model to another is out of the first one's element and the inverse of the second one's, so maps around
any cycle close exactly, which matching pair by pair does not give.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.assignment import solve_assignments
from jaxtune.align.bases import centred_polar_factor, polar_factor
from jaxtune.align.problem import make_problem
from jaxtune.align.relaxed import ORDER_KINDS, contract
from jaxtune.align.weights import Search, match_weights
from jaxtune.errors import ConfigError, SpecError, unknown_name
from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, check_same, flatten, is_float, map_leaves
from jaxtune.types import Params

STARTS = ("first", "identity")
ROTATIONS = ("orthogonal", "centred_orthogonal")
# Steps in a row that gain less than `tolerance` of the objective before the search ends.
NUM_IDLE = 5
MAX_ROUNDS = 20


@dataclass(frozen=True)
class UniverseResult:
    """An element for every model.

    Attributes:
        elements: Model -> element that brings it into the shared coordinates.
        objective: Sum over pairs of models of the inner products of their matched leaves there; no unit.
        objective_of_identity: The same where nothing has moved.
        is_converged: False where `max_steps` ended the search.
        num_steps: Steps on relaxed factors.
        relaxed: Objective of the relaxed factors after every step; never falls.
        history: Objective of hard elements: at the start, after the steps, and after every round of polish.
    """

    elements: tuple[dict[str, Any], ...]
    objective: float
    objective_of_identity: float
    is_converged: bool
    num_steps: int
    relaxed: tuple[float, ...]
    history: tuple[float, ...]

    def between(self, spec: Spec, source: int, target: int) -> dict[str, Any]:
        """The element that brings model number `source` to model number `target`."""
        return elements.compose(spec, elements.invert(spec, self.elements[target]), self.elements[source])


def match_universe(
    key: jax.Array,
    spec: Spec,
    models: Sequence[Params],
    *,
    start: str = "first",
    max_steps: int = 50,
    tolerance: float = 1e-6,
    head_cost: str = "circuit",
) -> UniverseResult:
    """Matches all models jointly, by Frank-Wolfe steps on the product of their groups.

    Orders are relaxed to doubly stochastic matrices and rotations to matrices of spectral norm at most 1. A step goes
    from where the factors of all models stand towards the group elements that the gradient favours (an assignment, a
    polar factor), as far as the objective, a polynomial of the step, is best. Then factors are made hard, and each
    model in turn is matched to the mean of the others until that gains nothing; maps inside heads move there alone.

    Args:
        key: Of the matching to the first model.
        spec: Symmetry of all; an exact one.
        models: One architecture, two or more.
        start: "first": every model is matched to the first one before. "identity": nothing is.
        max_steps, tolerance: Of the Frank-Wolfe steps.
        head_cost: As in `match_weights`.

    Raises:
        ConfigError: fewer than two models, `max_steps` below 0.
        UnknownNameError: another `start`.
        SpecError, TreeMismatchError, NonFiniteError: as `match_weights`.

    Reference:
        Crisostomi et al. 2024, arXiv:2405.17897 (C2M3). Differs: starts from matching; rotations and heads; the line
        search is exact for any number of moved axes; polished after rounding, with maps inside heads. The order of
        heads whose units have bases of their own stays with the start and the polish.
    """
    _check(spec, models, start, max_steps)
    standing = _start(key, spec, models, start, head_cost)
    moved = [elements.apply(spec, e, m) for e, m in zip(standing, models, strict=True)]
    history = [joint_objective(spec, moved)]
    corrections, relaxed, is_converged = _frank_wolfe(spec, moved, max_steps, tolerance)
    rounded = [elements.apply(spec, c, m) for c, m in zip(corrections, moved, strict=True)]
    if joint_objective(spec, rounded) > history[0]:
        standing = [elements.compose(spec, c, e) for c, e in zip(corrections, standing, strict=True)]
        moved = rounded
    history.append(joint_objective(spec, moved))
    standing, polished = _polish(spec, models, standing, head_cost, tolerance)
    return UniverseResult(
        elements=tuple(standing),
        objective=polished[-1] if polished else history[-1],
        objective_of_identity=joint_objective(spec, models),
        is_converged=is_converged,
        num_steps=len(relaxed) - 1,
        relaxed=tuple(relaxed),
        history=(*history, *polished),
    )


def match_mean(
    key: jax.Array,
    spec: Spec,
    models: Sequence[Params],
    *,
    start: str = "first",
    tolerance: float = 1e-6,
    head_cost: str = "circuit",
) -> UniverseResult:
    """The baseline: every model in turn is matched to the mean of the others, until that gains nothing.

    Args, Raises: As `match_universe`.

    Reference:
        Ainsworth et al. 2023, arXiv:2209.04836, Algorithm 3 (MergeMany).
    """
    _check(spec, models, start, 0)
    standing = _start(key, spec, models, start, head_cost)
    first = joint_objective(spec, [elements.apply(spec, e, m) for e, m in zip(standing, models, strict=True)])
    standing, polished = _polish(spec, models, standing, head_cost, tolerance)
    return UniverseResult(
        elements=tuple(standing),
        objective=polished[-1] if polished else first,
        objective_of_identity=joint_objective(spec, models),
        is_converged=len(polished) < MAX_ROUNDS,
        num_steps=0,
        relaxed=(),
        history=(first, *polished),
    )


def move_together(spec: Spec, result: UniverseResult, models: Sequence[Params], *, reference: int = 0) -> list:
    """All models in the coordinates of model number `reference`."""
    return [elements.apply(spec, result.between(spec, m, reference), model) for m, model in enumerate(models)]


def average_in_universe(
    spec: Spec,
    result: UniverseResult,
    models: Sequence[Params],
    *,
    weights: Sequence[float] | None = None,
    reference: int = 0,
) -> dict[str, Any]:
    """Mean of the models where all are matched, in the coordinates and dtypes of model number `reference`.

    Integer and boolean leaves are the reference's. Networks with batch norms need
    `interpolate.repair.repair_average` afterwards, with the models of `move_together`.

    Args:
        spec, result, models: Of `match_universe`.
        weights: Of each model; None: equal. Divided by their sum.
        reference: Whose coordinates.

    Raises:
        ConfigError: weights of another number, not finite, or of sum 0.
    """
    weights = np.ones(len(models)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(models),) or not np.isfinite(weights).all() or weights.sum() == 0:
        raise ConfigError(f"weights {weights.tolist()}: one finite number for each of {len(models)} models, sum not 0.")
    shares = weights / weights.sum()
    moved = move_together(spec, result, models, reference=reference)

    def mean(path, leaf, *leaves):
        del path
        if not is_float(leaf):
            return leaf
        return sum(share * np.asarray(one, np.float64) for share, one in zip(shares, leaves, strict=True)).astype(
            leaf.dtype
        )

    return map_leaves(mean, models[reference], *moved)


def joint_objective(spec: Spec, moved: Sequence[Params]) -> float:
    """Sum over pairs of models, and over matched leaves, of their inner products."""
    total = 0.0
    trees = [flatten(model) for model in moved]
    for path in spec.axes:
        if path not in spec.unmatched:
            leaves = np.stack([np.asarray(tree[path], np.float64).ravel() for tree in trees])
            total += (np.sum(leaves.sum(axis=0) ** 2) - np.sum(leaves**2)) / 2
    return float(total)


def _check(spec, models, start, max_steps):
    if len(models) < 2:
        raise ConfigError(f"{len(models)} models: there is nothing to match. Give two or more.")
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    if max_steps < 0:
        raise ConfigError(f"max_steps is {max_steps}; it must not be negative.")
    if not spec.is_exact:
        raise SpecError('an average needs exact elements: the symmetry with junctions="shared".')
    check_same({f"model {n}": model for n, model in enumerate(models)})
    for n, model in enumerate(models):
        spec.check(model)
        check_finite(f"model {n}", model)


def _start(key, spec, models, start, head_cost):
    identity = elements.identity(spec)
    if start == "identity":
        return [identity for _ in models]
    found = [
        match_weights(named_key(key, "model", n), spec, models[0], model, head_cost=head_cost).element
        for n, model in enumerate(models[1:], 1)
    ]
    return [identity, *found]


def _frank_wolfe(spec, moved, max_steps, tolerance):
    """(a correction of every model, objective after every step, whether it came to rest)."""
    groups = _free_groups(spec)
    layout, degree = _layout_of(spec, groups)
    leaves = {
        path: jnp.stack([jnp.asarray(np.asarray(flatten(model)[path], np.float32)) for model in moved])
        for path, _ in layout
    }
    fixed = joint_objective(spec, moved) - float(_objective({}, leaves, tuple((path, ()) for path, _ in layout)))
    factors = {
        name: jnp.tile(jnp.eye(spec.groups[name].size), (len(moved), *[c or 1 for c in (spec.count_of(name),)], 1, 1))
        for name in groups
    }
    factors = {name: x if spec.count_of(name) else x[:, 0] for name, x in factors.items()}
    steps = (1 - np.cos(np.pi * np.arange(degree + 1) / max(degree, 1))) / 2  # from 0 to 1, dense at the ends
    relaxed, num_idle = [float(_objective(factors, leaves, layout))], 0
    while groups and len(relaxed) <= max_steps and num_idle < NUM_IDLE:
        gradient = _gradient(factors, leaves, layout)
        ahead = {name: best_corner(spec.groups[name].kind, gradient[name]) for name in groups}
        values = np.asarray(_along(factors, ahead, leaves, jnp.asarray(steps, jnp.float32), layout), np.float64)
        step, value = best_step(steps, values)
        if value - relaxed[-1] <= tolerance * abs(relaxed[-1]):
            num_idle += 1
        else:
            num_idle = 0
        if step == 0 or value <= relaxed[-1]:
            break  # the best corner is where the factors stand: the next step would be the same
        share = np.float32(step)
        factors = {name: (1 - share) * factors[name] + share * ahead[name] for name in groups}
        relaxed.append(value)
    is_converged = not groups or len(relaxed) <= max_steps
    corners = {name: best_corner(spec.groups[name].kind, factors[name]) for name in groups}
    corrections = [
        {**elements.identity(spec), **{name: value_of(spec.groups[name].kind, corners[name][m]) for name in groups}}
        for m in range(len(moved))
    ]
    return corrections, [value + fixed for value in relaxed], is_converged


def best_step(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Where on [0, 1] the polynomial through the given points is highest, and how high.

    Shapes:
        steps, values: float64[degree + 1]; steps differ and hold 0 and 1.
    """
    polynomial = np.polynomial.Polynomial.fit(steps, values, len(steps) - 1)
    turns = polynomial.deriv().roots() if len(steps) > 2 else np.zeros(0)
    turns = turns[np.abs(turns.imag) < 1e-9].real
    candidates = np.concatenate([[0.0, 1.0], turns[(turns > 0) & (turns < 1)]])
    heights = polynomial(candidates)
    best = int(np.argmax(heights))
    return float(candidates[best]), float(heights[best])


def _free_groups(spec):
    """Groups that the steps move: orders and rotations, but for heads whose units have bases of their own."""
    parents = {group.parent for group in spec.groups.values() if group.kind not in ORDER_KINDS and group.parent}
    return [
        name
        for name, group in spec.groups.items()
        if (group.kind in ORDER_KINDS or group.kind in ROTATIONS) and name not in parents
    ]


def _layout_of(spec, groups):
    """((path, ((axis, group, axis of the parent), ...)), ...) of matched leaves, and the degree in one step."""
    layout, degree = [], 0
    for path, axes in spec.axes.items():
        owners = [axis.group if axis else None for axis in axes]
        moves = [
            (position, owner, owners.index(spec.groups[owner].parent) if spec.groups[owner].parent else None)
            for position, owner in enumerate(owners)
            if owner in groups
        ]
        if path not in spec.unmatched and moves:
            layout.append((path, tuple(sorted(moves, key=lambda move: move[2] is not None))))
            degree = max(degree, 2 * len(moves))
    return tuple(layout), degree


def best_corner(kind: str, scores: np.ndarray) -> np.ndarray:
    """The element whose inner product with `scores` is highest, as a matrix [source unit, target unit].

    Shapes:
        scores: float[..., n, n]; result: float32[..., n, n].
    """
    scores = np.asarray(scores, np.float64)
    if kind in ROTATIONS:
        solve = polar_factor if kind == "orthogonal" else centred_polar_factor
        flat = scores.reshape(-1, *scores.shape[-2:])
        return np.stack([solve(one) for one in flat]).reshape(scores.shape).astype(np.float32)
    orders = solve_assignments(np.swapaxes(scores, -1, -2))
    return np.swapaxes(np.eye(scores.shape[-1], dtype=np.float32)[orders], -1, -2)


def value_of(kind: str, matrix: np.ndarray) -> np.ndarray:
    """The value of a group whose matrix is `matrix`, a corner."""
    if kind in ROTATIONS:
        return np.asarray(matrix, np.float64)
    order = np.argmax(matrix, axis=-2).astype(np.int32)
    return order if kind == "permutation" else np.stack([order.astype(np.float64), np.ones(order.shape)], axis=-2)


def _objective_of(factors, leaves, layout):
    total = jnp.zeros(())
    for path, moves in layout:
        leaf = leaves[path]
        for position, name, parent in moves:
            leaf = jax.vmap(functools.partial(contract, axis=position, parent_axis=parent))(factors[name], leaf)
        total += (jnp.sum(jnp.sum(leaf, axis=0) ** 2) - jnp.sum(leaf**2)) / 2
    return total


_objective = jax.jit(_objective_of, static_argnums=2)
_gradient = jax.jit(jax.grad(_objective_of), static_argnums=2)


@functools.partial(jax.jit, static_argnums=4)
def _along(factors, ahead, leaves, steps, layout):
    def value(step):
        between = jax.tree.map(lambda x, y: (1 - step) * x + step * y, factors, ahead)
        return _objective_of(between, leaves, layout)

    return jax.lax.map(value, steps)


def _polish(spec, models, standing, head_cost, tolerance):
    """(elements, objective after every round) of matching each model to the mean of the others, in turn."""
    standing = list(standing)
    moved = [elements.apply(spec, e, m) for e, m in zip(standing, models, strict=True)]
    history, before = [], joint_objective(spec, moved)
    for _ in range(MAX_ROUNDS):
        for m in range(len(models)):
            others = [flatten(one) for n, one in enumerate(moved) if n != m]
            mean = {path: _mean([one[path] for one in others]) for path in others[0]}
            problem = make_problem(spec, mean, flatten(moved[m]), head_cost=head_cost, weighting="plain")
            search = Search(problem)
            found = search.run("identity", None, max_sweeps=100, tolerance=tolerance, element=elements.identity(spec))
            if found.objective > problem.objective_of_identity:
                standing[m] = elements.compose(spec, found.element, standing[m])
                moved[m] = elements.apply(spec, standing[m], models[m])
        history.append(joint_objective(spec, moved))
        if history[-1] - before <= tolerance * abs(before):
            break
        before = history[-1]
    return standing, history


def _mean(leaves: Sequence[Any]) -> np.ndarray:
    if not is_float(leaves[0]):
        return np.asarray(leaves[0])
    return np.mean([np.asarray(leaf, np.float32) for leaf in leaves], axis=0, dtype=np.float32)
