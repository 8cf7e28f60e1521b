"""Fusion by optimal transport: every hidden unit of a target is made of shares of a source's units, of any width."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.activations import record_tables
from jaxtune.align.assignment import solve_assignment
from jaxtune.align.sinkhorn import sinkhorn
from jaxtune.align.units import features_of, hidden_groups, is_read
from jaxtune.errors import ConfigError, SpecError, unknown_name
from jaxtune.sample import Sample
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, flatten, is_float, unflatten
from jaxtune.types import Params

GROUNDS = ("activations", "weights")
MAX_EXACT = 4096  # units after both widths are brought to a common multiple
NUM_ITERATIONS = 500


@dataclass(frozen=True)
class Fused:
    """A source in the widths and places of a target.

    Attributes:
        params: The two fused, in the target's shapes and dtypes.
        moved: The source alone, in the target's shapes.
        plans: Group -> mass that goes from every source unit to every target unit, float64[n_source, n_target]; rows
            sum to 1 / n_source and columns to 1 / n_target.
        costs: Group -> what the plan pays, over what an even spread would.
    """

    params: dict[str, Any]
    moved: dict[str, Any]
    plans: dict[str, np.ndarray]
    costs: dict[str, float]


def fuse_models(
    spec: Spec,
    target: Params,
    source: Params,
    *,
    source_spec: Spec | None = None,
    sample: Sample | None = None,
    source_sample: Sample | None = None,
    ground: str = "activations",
    regularisation: float = 0.0,
    weight: float = 0.5,
    num_rows: int = 4096,
) -> Fused:
    """Carries hidden units by optimal transport, layer after layer, and averages what then lies in one place.

    A target's unit becomes the mean of the source units that send mass to it; what reads a source unit is spread over
    the target units that it went to, so that a network whose widths only repeat or split units keeps its function. All
    else (the stream, heads, inputs, outputs) must agree in size and is taken as it lies: align before.

    Args:
        spec: Symmetry of the target.
        target, source: Weights; hidden widths may differ.
        source_spec: Symmetry of the source; None: `spec`.
        sample: Inputs, for ground "activations".
        source_sample: The same inputs for the source's architecture; None: `sample`.
        ground: What units are compared by: "activations", or "weights" (what comes in, with earlier layers moved).
        regularisation: Of the entropy, times the median cost; 0: an exact plan.
        weight: Of the source in the fusion.
        num_rows: As in `match_activations`.

    Raises:
        UnknownNameError: another `ground`.
        ConfigError: `regularisation` is negative, `weight` not finite; no sample; exact plans between widths of too
            great a multiple.
        SpecError: leaves differ beyond hidden widths.

    Reference:
        Singh and Jaggi 2020, arXiv:1910.05653. Differs: readers are divided by the source's marginals rather than the
        target's, without which a network of another width reads its units as many times too often.
    """
    source_spec = spec if source_spec is None else source_spec
    _check(spec, source_spec, target, source, sample, ground, regularisation)
    if not np.isfinite(weight):
        raise ConfigError(f"weight is {weight}; it must be finite.")
    ours, theirs = flatten(target), {path: _wide(leaf) for path, leaf in flatten(source).items()}
    tables = None
    if ground == "activations":
        pairs = ((spec, target, sample), (source_spec, source, source_sample or sample))
        tables = [record_tables(one, params, inputs, num_rows=num_rows) for one, params, inputs in pairs]
    plans, costs = {}, {}
    for name in hidden_groups(spec):
        if tables is not None:
            units = [
                features_of(one, name, table, sample).T
                for one, table in zip((source_spec, spec), reversed(tables), strict=True)
            ]
        else:
            units = [_incoming(spec, name, tree) for tree in (theirs, ours)]
        cost = _distances(*units)
        plan = plans[name] = transport_plan(cost, regularisation=regularisation)
        costs[name] = float(np.sum(plan * cost) / max(cost.mean(), np.finfo(float).tiny))
        for path, axis in spec.leaves_of(name):
            share = plan.shape[0] if is_read(spec, path, axis) else plan.shape[1]
            matrix = (share * plan).astype(theirs[path].dtype)
            theirs[path] = np.moveaxis(np.tensordot(theirs[path], matrix, axes=(axis, 0)), -1, axis)
    for path, leaf in ours.items():
        if theirs[path].shape != leaf.shape:
            raise SpecError(f"{path}: the source moved has {list(theirs[path].shape)}, the target {list(leaf.shape)}.")

    def mix(path, leaf):
        if not is_float(leaf):
            return leaf
        return ((1 - weight) * np.asarray(leaf, np.float64) + weight * theirs[path]).astype(leaf.dtype)

    return Fused(
        params=unflatten({path: mix(path, leaf) for path, leaf in ours.items()}),
        moved=unflatten({path: theirs[path].astype(leaf.dtype) for path, leaf in ours.items()}),
        plans=plans,
        costs=costs,
    )


def transport_plan(cost: np.ndarray, *, regularisation: float = 0.0) -> np.ndarray:
    """The plan of least cost between even masses: float64[m, n], rows summing to 1/m and columns to 1/n.

    Args:
        cost: Of each source unit and target unit, at least 0.
        regularisation: Weight of the plan's negative entropy over the median cost; 0: an exact plan, by an assignment
            of units that are repeated until both sides have equally many.

    Shapes:
        cost: float[m, n].

    Raises:
        ConfigError: an exact plan would take more than 4096 repeated units.
    """
    rows, columns = cost.shape
    if regularisation:
        scale = regularisation * max(float(np.median(cost)), np.finfo(np.float32).tiny)
        plan = sinkhorn(
            jnp.asarray(-cost / scale, jnp.float32),
            num_iterations=NUM_ITERATIONS,
            rows=jnp.full(rows, 1 / rows),
            columns=jnp.full(columns, 1 / columns),
        )
        return np.asarray(jax.device_get(plan), np.float64)
    many = math.lcm(rows, columns)
    if many > MAX_EXACT:
        raise ConfigError(
            f"an exact plan between {rows} and {columns} units is an assignment of {many}; pass regularisation=0.05."
        )
    repeated = np.repeat(np.repeat(cost, many // rows, axis=0), many // columns, axis=1)
    order = solve_assignment(-repeated)
    plan = np.zeros(cost.shape)
    np.add.at(plan, (np.arange(many) // (many // rows), order // (many // columns)), 1 / many)
    return plan


def _check(spec, source_spec, target, source, sample, ground, regularisation):
    if ground not in GROUNDS:
        raise unknown_name("ground", ground, GROUNDS)
    if not (np.isfinite(regularisation) and regularisation >= 0):
        raise ConfigError(f"regularisation is {regularisation}; it must be finite and not negative.")
    if ground == "activations" and sample is None:
        raise ConfigError('ground "activations" needs unlabelled inputs: pass sample=, or ground="weights".')
    for name, one, params in (("target", spec, target), ("source", source_spec, source)):
        one.check(params)
        check_finite(name, params)
    if spec.axes != source_spec.axes:
        raise SpecError("target and source are not of one family: their leaves have other owners.")
    hidden = set(hidden_groups(spec))
    other = [n for n, g in spec.groups.items() if n not in hidden and g.size != source_spec.groups[n].size]
    if other:
        raise SpecError(f"only hidden widths may differ, and these do: {', '.join(other)}.")


def _wide(leaf):
    return np.asarray(leaf).astype(np.promote_types(leaf.dtype, np.float32)) if is_float(leaf) else np.asarray(leaf)


def _incoming(spec, name, leaves):
    """What comes into every unit of a group, all writers side by side: float64[n, weights]."""
    rows = [
        np.moveaxis(np.asarray(leaves[path], np.float64), axis, 0).reshape(leaves[path].shape[axis], -1)
        for path, axis in spec.leaves_of(name)
        if not is_read(spec, path, axis)
    ]
    return np.concatenate(rows, axis=1)


def _distances(ours, theirs):
    """Mean squared differences of rows: float64[m, n]."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    squares = np.sum(ours**2, axis=1)[:, None] + np.sum(theirs**2, axis=1)[None]
    return np.maximum(squares - 2 * ours @ theirs.T, 0) / ours.shape[1]
