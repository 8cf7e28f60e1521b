"""Joins units of several models, across them or within one: what does not fit another model's unit may fit its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.align.activations import record_tables
from jaxtune.align.units import features_of, hidden_groups, is_read
from jaxtune.errors import ConfigError
from jaxtune.sample import Sample
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, check_same, flatten, is_float, unflatten
from jaxtune.types import Params


@dataclass(frozen=True)
class Zipped:
    """Models whose shared layers are one.

    Attributes:
        params: One tree for each model, of its own shapes; the shared leaves are the same in all. One tree would do
            where every leaf is shared.
        groups: Group -> which joined unit every unit of every model went to, int32[models, n].
        num_within: Group -> joined units whose members are all of one model.
        correlation: Group -> mean correlation of the pairs that were joined.
    """

    params: tuple[dict[str, Any], ...]
    groups: dict[str, np.ndarray]
    num_within: dict[str, int]
    correlation: dict[str, float]


def zip_models(
    spec: Spec,
    models: Sequence[Params],
    *,
    sample: Sample,
    groups: Sequence[str] | None = None,
    shared: str = ".*",
    within: float = 1.0,
    num_rows: int = 4096,
) -> Zipped:
    """Merges models by joining hidden units that do the same, wherever they are.

    All units of all models are joined, the most correlated first, until as many are left as one model has; a joined
    unit is the mean of its members, and what read a member reads it. Streams and heads are averaged as they lie:
    models of other bases are aligned first.

    Args:
        spec: Symmetry of the models.
        models: One architecture, two or more; for the same inputs.
        sample: Inputs; labels are not looked at.
        groups: Groups of hidden units to join; None: all. The others are averaged unit by unit.
        shared: Leaves whose path matches become one; the others stay each model's own and read the joined units.
            For a network that is zipped up to some depth.
        within: Factor of positive correlations inside one model: 1 as good as across, 0 never joined inside. Of three
            models or more, two units of one can then still meet where both fit a third model's.
        num_rows: As in `match_activations`.

    Raises:
        ConfigError: fewer than two models; nothing recorded; no groups.
        UnknownNameError: no such group.
        TreeMismatchError, SpecError, NonFiniteError: the trees do not fit.

    Reference:
        Stoica et al. 2024, arXiv:2305.03053 (ZipIt!). Differs: more than two models are joined in one greedy pass.
    """
    if len(models) < 2:
        raise ConfigError(f"{len(models)} models: there is nothing to join. Give two or more.")
    if not 0 <= within <= 1:
        raise ConfigError(f"within is {within}; it must lie between 0 and 1.")
    check_same({f"model {n}": model for n, model in enumerate(models)})
    for n, model in enumerate(models):
        spec.check(model)
        check_finite(f"model {n}", model)
    pattern = re.compile(shared)
    is_shared = {path: bool(pattern.fullmatch(path)) for path in spec.axes}
    tables = [record_tables(spec, model, sample, num_rows=num_rows) for model in models]
    joined, num_within, correlation = {}, {}, {}
    for name in hidden_groups(spec, groups):
        writers = {path: is_shared[path] for path, axis in spec.leaves_of(name) if not is_read(spec, path, axis)}
        if len(set(writers.values())) > 1:
            raise ConfigError(f"shared={shared!r} shares some of the leaves that write {name}: {', '.join(writers)}.")
        if all(writers.values()):
            features = [features_of(spec, name, table, sample) for table in tables]
            joined[name], correlation[name] = join_units(features, within=within)
            num_within[name] = _count_within(joined[name])
    trees = [flatten(model) for model in models]
    results: list[dict[str, Any]] = [{} for _ in models]
    for path in trees[0]:
        leaves = [tree[path] for tree in trees]
        if not is_float(leaves[0]):
            for result, leaf in zip(results, leaves, strict=True):
                result[path] = leaf
            continue
        num_models = len(models) if is_shared[path] else 0
        moved = [_move(spec, path, leaf, joined, n, num_models) for n, leaf in enumerate(leaves)]
        whole = np.sum(moved, axis=0)
        for result, own, leaf in zip(results, moved, leaves, strict=True):
            result[path] = (whole if is_shared[path] else own).astype(leaf.dtype)
    return Zipped(tuple(unflatten(result) for result in results), joined, num_within, correlation)


def join_units(features: Sequence[np.ndarray], *, within: float = 1.0) -> tuple[np.ndarray, float]:
    """(which joined unit every unit goes to, mean correlation of what was joined).

    Greedy: the two most correlated of all that are left, until as many are left as one model has. Of two models every
    unit is joined once; of more, a joined unit counts as the mean of its members and may be joined again.

    Shapes:
        features: float[M, n] of each model, the same rows; result: int32[models, n].

    Correlations with a unit that never changes are 0, so dead units are joined late.
    """
    size, num_models = features[0].shape[1], len(features)
    table = np.concatenate([np.asarray(one, np.float64) for one in features], axis=1)
    table = table - table.mean(axis=0)
    covariance = table.T @ table
    owner = np.repeat(np.arange(num_models), size)  # -1: of several models
    cluster, counts, is_left = np.arange(len(owner)), np.ones(len(owner)), np.ones(len(owner), bool)
    score = _weigh(_correlate(covariance, slice(None)), owner[:, None] == owner, within)
    np.fill_diagonal(score, -np.inf)
    found = []
    for _ in range(len(owner) - size):
        i, j = sorted(np.unravel_index(np.argmax(score), score.shape))
        found.append(_correlate(covariance, i)[j])
        shares = counts[[i, j]] / counts[[i, j]].sum()
        covariance[i] = shares @ covariance[[i, j]]
        covariance[:, i] = covariance[:, [i, j]] @ shares
        counts[i] += counts[j]
        owner[i] = owner[i] if owner[i] == owner[j] else -1
        cluster[cluster == j] = i
        is_left[j] = False
        score[j] = score[:, j] = -np.inf
        row = _weigh(_correlate(covariance, i), (owner == owner[i]) & (owner >= 0), within)
        row = np.where(is_left, row, -np.inf) if num_models > 2 else -np.inf
        score[i] = score[:, i] = row
        score[i, i] = -np.inf
    labels = np.unique(cluster, return_inverse=True)[1]
    return labels.reshape(num_models, size).astype(np.int32), float(np.mean(found))


def _correlate(covariance, rows):
    """Correlations of some rows with all: float64[..., n]."""
    deviation = np.sqrt(np.maximum(np.diagonal(covariance), 0))
    product = np.multiply.outer(deviation[rows], deviation)
    return np.divide(covariance[rows], product, out=np.zeros_like(product), where=product > 0)


def _weigh(correlation, is_inside, within):
    """What pairs are chosen by; below 0 a factor would make a pair inside one model better and not worse."""
    lesser = np.where(correlation > 0, within * correlation, correlation) if within else -np.inf
    return np.where(is_inside, lesser, correlation)


def _count_within(labels):
    """Joined units whose members are all of one model."""
    return sum(len({m for m, row in enumerate(labels) if unit in row}) == 1 for unit in range(labels.max() + 1))


def _move(spec, path, leaf, joined, model, num_models):
    """What a model gives to a shared leaf (`num_models` above 0), or what its own leaf becomes (0)."""
    leaf = np.asarray(leaf).astype(np.promote_types(leaf.dtype, np.float32))
    share = 1 / num_models if num_models else 1.0
    for position, axis in enumerate(spec.axes[path]):
        if axis is None or axis.group not in joined:
            continue
        labels = joined[axis.group]
        matrix = np.eye(labels.shape[1], dtype=leaf.dtype)[labels[model]]  # [unit, joined unit]
        if not is_read(spec, path, position):
            matrix /= np.bincount(labels.ravel(), minlength=len(matrix))[None].astype(leaf.dtype)
            share = 1.0
        leaf = np.moveaxis(np.tensordot(leaf, matrix, axes=(position, 0)), -1, position)
    return leaf * leaf.dtype.type(share)
