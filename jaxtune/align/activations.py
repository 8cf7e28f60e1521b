"""Activation matching: the element that brings what a source computes inside closest to what a target computes.

What units do on the same inputs is a table, [row, unit], that moves with the group of the units as a leaf does. So the
recorded tables of all matrices are a tree with a symmetry of its own, and weight matching finds the element on it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.align.weights import MatchResult, match_weights
from jaxtune.errors import ConfigError, SpecError
from jaxtune.gradients import check_sample
from jaxtune.moments import weigh_rows
from jaxtune.sample import Sample, inputs_of
from jaxtune.symmetry import canonical
from jaxtune.symmetry.spec import Spec, make_spec
from jaxtune.tree import check_finite, check_same, flatten, unflatten
from jaxtune.types import Params

RECORD_BATCH = 32
ORDER_KINDS = ("permutation", "signed_permutation")
# Of a unit's deviation, relative to its layer's: a dead unit correlates with nothing.
DEAD = 1e-6

# Path of a matrix -> (what it reads, what it makes): float[M, n_in], float[M, n_out].
Tables = Mapping[str, tuple[np.ndarray, np.ndarray]]


def match_activations(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    sample: Sample,
    num_rows: int = 4096,
    head_cost: str = "circuit",
    num_restarts: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-6,
) -> MatchResult:
    """Finds the element under which the units of `source` do on a sample what those of `target` do.

    Units in any order are matched by their correlations (one assignment), rotations of the stream by the polar factor
    of the cross-covariance, heads first by their attention circuits and then inside.

    Args:
        key: Orders the groups in restarts. Rows are drawn the same way for every key.
        spec: Symmetry of both networks, or of their folded weights.
        target, source: As `match_weights`.
        sample: Inputs; labels are not looked at.
        num_rows: At most so many rows (examples times tokens) of every matrix are kept.
        head_cost, num_restarts, max_sweeps, tolerance: As in `match_weights`.

    Raises:
        ConfigError, DataError: as `record_tables`.
        SpecError: as `match_weights`; the family has no place for folded weights.
        TreeMismatchError, NonFiniteError, UnknownNameError: as `match_weights`.

    Reference:
        Li et al. 2015, arXiv:1511.07543; Ainsworth et al. 2023, arXiv:2209.04836, section 3.1; for transformers Verma
        and Elbayad 2024, arXiv:2403.00986. Differs: all groups at once and of every kind; the output side of a head,
        of which nothing is recorded, by its weights.
    """
    check_same({"target": target, "source": source})
    spec.check(target)
    for name, params in (("target", target), ("source", source)):
        check_finite(name, params)
    tables = [record_tables(spec, params, sample, num_rows=num_rows) for params in (target, source)]
    table_spec, *trees = lay_out_tables(spec, (target, source), tables)
    return match_weights(
        key,
        table_spec,
        *trees,
        head_cost=head_cost,
        weighting="unit",
        num_restarts=num_restarts,
        max_sweeps=max_sweeps,
        tolerance=tolerance,
    )


def record_tables(spec: Spec, params: Params, sample: Sample, *, num_rows: int) -> dict[str, tuple]:
    """What every matrix of a network reads and makes on a sample, the same rows for every network.

    Args:
        spec: Of `params`; folded weights are run as a network of their family.
        params: Weights.
        sample: Inputs.
        num_rows: At most so many rows are kept, drawn by chance.

    Shapes:
        returns: path -> (inputs float32[M, n_in], outputs float32[M, n_out], the leaf's axes that are read).

    Raises:
        ConfigError: the sample's family cannot be recorded; `num_rows` below 2.
        DataError: there are no examples, or an input holds NaN.
    """
    if sample.record is None:
        raise ConfigError(f"{sample.name}: what this family computes inside cannot be recorded; match its weights.")
    if num_rows < 2:
        raise ConfigError(f"num_rows is {num_rows}; correlations need at least 2.")
    check_sample(sample, params, is_labelled=False)
    if canonical.is_folded(spec):
        params = canonical.lay_out(spec.form, params)
    size = min(RECORD_BATCH, len(sample))
    found: dict[str, list] = {}
    num_chunks = -(-len(sample) // size)
    draw = np.random.RandomState(0)
    for chunk in sample.without_labels().chunks(size):
        for path, site in _record(sample.record, params, inputs_of(chunk)).items():
            rows = np.flatnonzero(np.asarray(weigh_rows(site, chunk)))
            share = max(1, num_rows // num_chunks)
            if len(rows) > share:
                rows = np.sort(draw.choice(rows, share, replace=False))
            taken = tuple(np.asarray(table)[rows].astype(np.float32) for table in (site.inputs, site.outputs))
            found.setdefault(path, []).append((*taken, site.in_axes))
    return {
        path: (np.concatenate([one[0] for one in parts]), np.concatenate([one[1] for one in parts]), parts[0][2])
        for path, parts in found.items()
    }


def lay_out_tables(
    spec: Spec, networks: tuple[Params, Params], tables: list[dict[str, tuple]]
) -> tuple[Spec, dict[str, Any], dict[str, Any]]:
    """(spec, target's tree, source's tree) of recorded tables; an element of this spec is one of `spec`.

    Centred; where units have an order and no length of their own (hidden units, channels), each is divided by its
    deviation, so that products are correlations. Beside them the weights behind units that heads hand on, and of groups
    of which nothing was recorded.

    Args:
        spec: Symmetry of the networks.
        networks: Target and source.
        tables: `record_tables` of either.
    """
    axes, trees = {}, ({}, {})
    for path, (_, _, in_axes) in tables[0].items():
        owners = spec.axes.get(path)
        if owners is None or path in spec.unmatched:
            continue
        shape = flatten(networks[0])[path].shape
        for side, name in enumerate(("inputs", "outputs")):
            mine = [a for a in range(len(owners)) if (a in in_axes) == (side == 0)]
            row = tuple(owners[a].dualised if side == 0 and owners[a] else owners[a] for a in mine)
            if not any(row):
                continue
            lengths = [shape[a] for a in mine]
            pair = [table[path][side] for table in tables]
            if np.prod(lengths) != pair[0].shape[1]:
                raise SpecError(
                    f"{path}: {pair[0].shape[1]} {name} recorded, and the leaf {list(shape)} has {lengths}."
                )
            pair = [_standardise(spec, row, values).reshape(-1, *lengths) for values in pair]
            if any(axes[other][1:] == row and np.array_equal(trees[0][other], pair[0]) for other in axes):
                continue  # queries, keys and values read one table
            place = f"{name}/{path}"
            axes[place] = (None, *row)
            for tree, values in zip(trees, pair, strict=True):
                tree[place] = values
    recorded = {axis.group for row in axes.values() for axis in row if axis}
    leaves = [flatten(network) for network in networks]
    for path, row in spec.axes.items():
        owners = {axis.group for axis in row if axis}
        is_output_of_head = path in tables[0] and any(
            axis and axis.dual and spec.groups[axis.group].role == "vo" for axis in row
        )
        if (owners - recorded or is_output_of_head) and path not in spec.unmatched:
            axes[f"weights/{path}"] = row
            for tree, network in zip(trees, leaves, strict=True):
                tree[f"weights/{path}"] = np.asarray(network[path], np.float32)
    marks = {path: tuple(None if axis is None else axis.mark for axis in row) for path, row in axes.items()}
    table_spec = make_spec(spec.groups.values(), marks, junctions=spec.junctions)
    return (table_spec, *(unflatten(tree) for tree in trees))


def _standardise(spec, row, values):
    values = values - values.mean(axis=0, dtype=np.float64).astype(np.float32)
    kinds = {spec.groups[axis.group].kind if axis else None for axis in row}
    if kinds <= set(ORDER_KINDS):
        deviation = values.std(axis=0, dtype=np.float64)
        floor = DEAD * max(float(deviation.max(initial=0.0)), np.finfo(np.float32).tiny)
        values = values / np.where(deviation > floor, deviation, np.inf).astype(np.float32)
    return values


@functools.partial(jax.jit, static_argnums=0)
def _record(record, params, batch):
    return record(params, batch)
