"""Many models at once: each has an element that brings it into coordinates that all share.

The map from one model to another is out of the first one's element and the inverse of the second one's, so maps around
any cycle close exactly, which matching pair by pair does not give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.align.frank_wolfe import climb_relaxed, joint_objective
from jaxtune.align.problem import make_problem
from jaxtune.align.weights import Search, match_weights
from jaxtune.errors import ConfigError, SpecError, unknown_name
from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, check_same, flatten, is_float, map_leaves
from jaxtune.types import Params

STARTS = ("first", "identity")
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
    corrections, relaxed, is_converged = climb_relaxed(spec, moved, max_steps, tolerance)
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
