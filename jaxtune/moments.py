"""Second moments of what goes into and comes out of every matrix, summed over a sample chunk by chunk.

What is held is one chunk of the sample and one table a matrix: the length of the sample costs time and no memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError, DataError, NonFiniteError
from jaxtune.sample import Sample, inputs_of
from jaxtune.types import Params

HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Gram:
    """Of what one matrix reads: `X^T X`, the sum of its rows, and their number.

    Shapes:
        gram: float64[n, n]; total: float64[n].
    """

    gram: np.ndarray
    total: np.ndarray
    count: float
    in_axes: tuple[int, ...]

    @property
    def covariance(self) -> np.ndarray:
        """`(X - mean)^T (X - mean) / count`."""
        return (self.gram - np.outer(self.total, self.total) / self.count) / self.count


@dataclass(frozen=True)
class Pair:
    """Of one side of one matrix in two networks: rows of X are the first's, rows of Y the second's.

    Shapes:
        cross: float64[n_x, n_y], `X^T Y`; first: float64[n_x, n_x]; second: float64[n_y, n_y].
        totals: (float64[n_x], float64[n_y]).
    """

    cross: np.ndarray
    first: np.ndarray
    second: np.ndarray
    totals: tuple[np.ndarray, np.ndarray]
    count: float

    def centred(self) -> "Pair":
        """The same of rows without their means."""
        x, y = self.totals
        return Pair(
            self.cross - np.outer(x, y) / self.count,
            self.first - np.outer(x, x) / self.count,
            self.second - np.outer(y, y) / self.count,
            (np.zeros_like(x), np.zeros_like(y)),
            self.count,
        )


@dataclass(frozen=True)
class Meeting:
    """One matrix in two networks on the same inputs.

    Attributes:
        inputs, outputs: Of what it reads and makes.
        gradients: Of the gradients of a loss with respect to what it makes; None where no loss was given.
        in_axes: The leaf's axes that it sums over.
    """

    inputs: Pair
    outputs: Pair
    gradients: Pair | None
    in_axes: tuple[int, ...]


def gather_grams(params: Params, sample: Sample, *, chunk_size: int = 32) -> dict[str, Gram]:
    """`X^T X` of what every matrix of a network reads on a sample.

    Args:
        params: Of the network.
        sample: Inputs; labels are not looked at. Rows of padding do not count.
        chunk_size: Examples at a time; another one sums in another order.

    Returns:
        Path of every matrix -> its `Gram`, in the order of their use.

    Raises:
        ConfigError: the family cannot be recorded; `chunk_size` below 1.
        DataError: no examples.
        NonFiniteError: an activation is NaN or infinite.
    """

    _check(sample)
    sites = _sites(sample, params)
    sums = _sum(partial(_own_moments, sample.record, params), sample, chunk_size)
    return {path: Gram(*sums[path][:2], float(sums[path][2]), site.in_axes) for path, site in sites.items()}


def gather_pairs(
    first: Params,
    second: Params,
    sample: Sample,
    *,
    chunk_size: int = 32,
    loss: Callable[[Params, Mapping[str, Any]], jax.Array] | None = None,
) -> dict[str, Meeting]:
    """Cross-moments of two networks at every matrix that both have.

    Args:
        first, second: Their parameters; sizes may differ where `sample` knows both (`sampling.for_sizes`).
        sample, chunk_size: As `gather_grams`.
        loss: (params, batch) -> float32[N], hashable; its gradients are met too. The sample may then need labels.

    Raises:
        ConfigError, DataError, NonFiniteError: as `gather_grams`; no matrix in common, or one that reads other tokens.
    """

    _check(sample)
    ours, theirs = _sites(sample, first), _sites(sample, second)
    common = [path for path in ours if path in theirs]
    if not common:
        raise ConfigError(f"{sample.name}: the two networks have no matrix in common.")
    for path in common:
        one, other = ours[path], theirs[path]
        if one.in_axes != other.in_axes or len(one.inputs) != len(other.inputs):
            raise ConfigError(
                f"{sample.name}: of one example {path} reads {len(one.inputs)} rows in one network and "
                f"{len(other.inputs)} in the other. Both must cut it into the same tokens."
            )
    sums = _sum(partial(_cross_moments, sample.record, loss, first, second), sample, chunk_size)
    return {
        path: Meeting(
            **{side: None if one is None else _pair(one) for side, one in sums[path].items()},
            in_axes=ours[path].in_axes,
        )
        for path in common
    }


@partial(jax.jit, static_argnums=0)
def _own_moments(record, params, batch):
    """Path -> (gram, total, count) of a chunk."""

    def moments(site):
        rows = weigh_rows(site, batch)
        weighed = site.inputs * rows[:, None]
        return _dot(site.inputs, weighed), jnp.sum(weighed, axis=0), jnp.sum(rows)

    return {path: moments(site) for path, site in record(params, inputs_of(batch)).items()}


@partial(jax.jit, static_argnums=(0, 1))
def _cross_moments(record, loss, first, second, batch):
    """Path -> side -> moments of a chunk, as `Pair` has them."""

    def meet(x, y, rows):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        weighed = y * rows[:, None]
        sums = (jnp.sum(x * rows[:, None], axis=0), jnp.sum(weighed, axis=0))
        return _dot(x, weighed), _dot(x, x * rows[:, None]), _dot(y, weighed), *sums, jnp.sum(rows)

    def sites_of(params):
        if loss is None:
            return record(params, inputs_of(batch))
        return record.gradients(lambda params, batch: jnp.sum(loss(params, batch) * batch["weight"]), params, batch)

    ours, theirs = sites_of(first), sites_of(second)
    found = {}
    for path in [path for path in ours if path in theirs]:
        a, b = ours[path], theirs[path]
        rows = weigh_rows(a, batch)
        found[path] = {
            "inputs": meet(a.inputs, b.inputs, rows),
            "outputs": meet(a.outputs, b.outputs, rows),
            "gradients": None if loss is None else meet(a.gradients, b.gradients, rows),
        }
    return found


def weigh_rows(site: Any, batch: Mapping[str, Any]) -> jax.Array:
    """float32[M]: 1 for a row that counts, 0 for a token of padding or of an example that only fills a chunk."""
    num_rows, weight = len(site.inputs), batch["weight"]
    if num_rows % (len(weight) * site.num_uses):
        raise ValueError(f"{num_rows} rows of {len(weight)} examples in {site.num_uses} uses")
    rows = jnp.repeat(jnp.asarray(weight, jnp.float32), num_rows // len(weight) // site.num_uses)
    rows = jnp.tile(rows, site.num_uses)
    return rows if site.mask is None else rows * site.mask.astype(jnp.float32)


def _dot(x, y):
    return jnp.matmul(x.T, y, precision=HIGHEST)


def _pair(moments):
    cross, first, second, *totals, count = moments
    return Pair(cross, first, second, tuple(totals), float(count))


def _check(sample):
    if sample.record is None:
        raise ConfigError(f"{sample.name}: what this family computes inside cannot be recorded.")
    if not len(sample):
        raise DataError(f"{sample.name}: there are no examples.")


def _sites(sample, params):
    """Path of every matrix -> shapes of what it reads and makes of one example, in the order of their use."""
    inputs = inputs_of({name: values[:1] for name, values in sample.batch.items()})
    sites = jax.eval_shape(sample.record, params, inputs).items()
    return dict(sorted(sites, key=lambda item: item[1].order))


def _sum(add, sample, chunk_size):
    """Sums over the chunks, in float64."""
    total = None
    for chunk in sample.chunks(min(chunk_size, len(sample))):
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), add(chunk))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    for path, one in total.items():
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one)):
            raise NonFiniteError(f"{sample.name}: what {path} reads or makes holds NaN or Inf.")
    return total
