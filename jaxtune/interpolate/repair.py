"""Mends the statistics of an averaged network, whose channels vary less than those of either end.

The mean of two channels that agree in part has less variance than each of them, layer after layer, and a batch norm
that divides by the averaged running variance lets the loss pass through. Both functions need a few batches of the data,
no labels, and know of a network what `observe` tells: they run outside `jit`, and compile nothing but that.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.errors import DataError, TreeMismatchError
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Params

Batch = Mapping[str, Any]
# (params, batch, is_training=) -> tree of "mean" and "var": of what every batch norm is given, over the batch; the
# norms divide by the batch's statistics in training, else by the running ones. With a model config:
# `functools.partial(registry.observe_norms, config)`, under `jax.jit` where there are many batches.
Observe = Callable[..., Params]

NORM_LEAVES = ("scale", "bias", "mean", "var")


def reset_statistics(observe: Observe, params: Params, batches: Sequence[Batch]) -> dict[str, Any]:
    """Running statistics as the data give them, everything else as it is.

    Args:
        observe: See `Observe`.
        params: For instance the average of two networks.
        batches: Data, each batch large enough to normalise by.

    Returns:
        A tree as `params`. The variance is that of all batches together, each normalised by itself further down.

    Raises:
        TreeMismatchError: a network without batch norms.
        DataError: no batches.

    Reference:
        Izmailov et al. 2018, arXiv:1803.05407, section 3.2. In a network with batch norms this is REPAIR where gains of
        both ends have one sign (Jordan et al. 2022, arXiv:2211.08403, section 4).
    """
    norms = find_norms(params)
    means, variances = _pool(observe, params, batches, norms, is_training=True)
    return _replace(
        params, {f"{path}/mean": means[path] for path in norms}, {f"{path}/var": variances[path] for path in norms}
    )


def repair(
    observe: Observe, first: Params, second: Params, weight: float, batches: Sequence[Batch], *, norm_eps: float = 1e-5
) -> dict[str, Any]:
    """The network at `weight` between two, every channel behind a batch norm with mean and deviation between theirs.

    Args:
        observe: See `Observe`.
        first, second: Two networks of one architecture, aligned beforehand.
        weight: 0 gives the weights of `first`, 1 those of `second`.
        batches: Data; gone through three times.
        norm_eps: Of the networks' batch norms.

    Returns:
        A tree as `first`: weights on the line, gains and offsets set, statistics as the data give them. Of a channel
        whose gains have opposite signs at the ends, the sign is that of the interpolated gain.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape, or have no batch norms.
        DataError: no batches.
        ValueError: a weight outside [0, 1], where no deviation lies between two.

    Reference:
        Jordan et al. 2022, arXiv:2211.08403, equations 2 and 3. Exact for one batch, but for `norm_eps`; the ends are
        measured as they run, by their own running statistics.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be within [0, 1], got {weight}")
    merged = interpolate_linear(first, second, weight)
    return repair_average(observe, merged, (first, second), (1 - weight, weight), batches, norm_eps=norm_eps)


def repair_average(
    observe: Observe,
    merged: Params,
    ends: Sequence[Params],
    shares: Sequence[float],
    batches: Sequence[Batch],
    *,
    norm_eps: float = 1e-5,
) -> dict[str, Any]:
    """`repair` of an average of any number of networks, all aligned beforehand.

    Args:
        observe, batches, norm_eps: As in `repair`.
        merged: The average.
        ends: The networks.
        shares: Of each in the average; their sum is 1.

    Raises:
        TreeMismatchError, DataError: as `repair`.
        ValueError: another number of shares than ends, one below 0, or another sum.
    """
    if len(shares) != len(ends) or min(shares, default=-1) < 0 or abs(math.fsum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be one for each of {len(ends)} networks, not negative, of sum 1; got {shares}")
    norms = find_norms(merged)
    measured = [_measure_outputs(observe, end, batches, norms, norm_eps) for end in ends]
    leaves = flatten(merged)
    offsets, gains = {}, {}
    for path in norms:
        mean, deviation = (
            sum(share * end[path][k] for share, end in zip(shares, measured, strict=True)) for k in (0, 1)
        )
        sign = np.where(np.asarray(leaves[f"{path}/scale"], np.float64) < 0, -1.0, 1.0)
        offsets[f"{path}/bias"], gains[f"{path}/scale"] = mean, sign * deviation
    return reset_statistics(observe, _replace(merged, offsets, gains), batches)


def find_norms(params: Params) -> list[str]:
    """Paths of all batch norms: whatever has a gain, an offset, a running mean and a running variance.

    Raises:
        TreeMismatchError: there is none.
    """
    leaves = flatten(params)
    parents = dict.fromkeys(path.rpartition("/")[0] for path in leaves)
    norms = [path for path in parents if all(f"{path}/{name}" in leaves for name in NORM_LEAVES)]
    if not norms:
        raise TreeMismatchError(f"no batch norm in the tree: nothing that has {', '.join(NORM_LEAVES)}.")
    return norms


def _measure_outputs(observe, params, batches, norms, norm_eps):
    """Norm -> (mean, standard deviation) of what comes out of it while the network runs as it is."""
    means, variances = _pool(observe, params, batches, norms, is_training=False)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    outputs = {}
    for path in norms:
        factor = leaves[f"{path}/scale"] / np.sqrt(leaves[f"{path}/var"] + norm_eps)
        mean = factor * (means[path] - leaves[f"{path}/mean"]) + leaves[f"{path}/bias"]
        outputs[path] = mean, np.abs(factor) * np.sqrt(variances[path])
    return outputs


def _pool(observe, params, batches, norms, *, is_training):
    """Norm -> mean, and norm -> variance, float64, over all batches together."""
    sizes, observed = [], []
    for batch in batches:
        sizes.append(len(next(iter(batch.values()))))
        statistics = flatten(observe(params, batch, is_training=is_training))
        observed.append({path: np.asarray(leaf, np.float64) for path, leaf in statistics.items()})
    if not math.fsum(sizes):
        raise DataError("no batches to take statistics from; pass a list with one or more.")
    shares = np.asarray(sizes, np.float64)[:, None] / sum(sizes)
    means, variances = {}, {}
    for path in norms:
        each = np.stack([one[f"{path}/mean"] for one in observed])
        means[path] = (shares * each).sum(0)
        within = np.stack([one[f"{path}/var"] for one in observed])
        variances[path] = (shares * (within + (each - means[path][None]) ** 2)).sum(0)
    return means, variances


def _replace(params, *changes):
    """`params` with other leaves at some paths, in the dtypes that they had."""
    leaves = flatten(params)
    for path, leaf in {path: leaf for change in changes for path, leaf in change.items()}.items():
        leaves[path] = np.asarray(leaf).astype(leaves[path].dtype)
    return unflatten(leaves)
