"""Layers that stand in the way between two models: sharpness of each layer along the line, and which to prune.

No code was ever released with the observation that a few straggler layers decide how an interpolated model fares on
shifted data, so this file says what is meant here:

- A layer is a group of leaves, by default all that share the first component of their paths ("block_3").
- Its sharpness at a point of the line is `max L(θ + δ) - L(θ)` over δ in this layer alone with `|δ| <= ρ |θ_l|`, found
  by a few steps of normalised gradient ascent, each as long as the radius and projected back onto the ball; the best
  of them counts, so it is never negative. Batches have a perturbation of their own each, and are averaged.
- Its barrier is that of the loss while this layer alone moves from one model to the other.
- Stragglers are the layers with the largest peak of one of the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError, DataError, unknown_name
from jaxtune.interpolate.barrier import Barrier, measure_barrier
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.sample import Sample, example_losses, weighted_mean
from jaxtune.tree import check_same, flatten, is_float, unflatten
from jaxtune.types import Params

NUM_POINTS = 11
CRITERIA = ("sharpness", "barrier")


@dataclass(frozen=True)
class Sharpness:
    """Sharpness of every layer at every point of a line.

    Attributes:
        weights: Of the points, 0 at the first model.
        layers: Names.
        values: float64[points, layers]; `whole` float64[points], with all layers perturbed at once.
        losses: float64[points], before any perturbation.
    """

    weights: np.ndarray
    layers: tuple[str, ...]
    values: np.ndarray
    whole: np.ndarray
    losses: np.ndarray

    @property
    def peaks(self) -> dict[str, float]:
        """Layer -> its largest value on the line."""
        return dict(zip(self.layers, self.values.max(axis=0).tolist(), strict=True))


def first_component(path: str) -> str:
    """The layer of a leaf: "block_3" of "block_3/attn/q/kernel"."""
    return path.split("/", 1)[0]


def measure_sharpness(
    first: Params,
    second: Params,
    sample: Sample,
    *,
    radius: float = 0.05,
    num_steps: int = 3,
    weights: Sequence[float] | None = None,
    layer_of: Callable[[str], str] = first_component,
    batch_size: int = 128,
) -> Sharpness:
    """Sharpness of every layer along the line; one compiled program for all points and layers.

    Args:
        first, second: Two models, for instance zero-shot and fine-tuned.
        sample: Labelled examples.
        radius: ρ, in lengths of the layer's own weights.
        num_steps: Of ascent.
        weights: Points; None: 11 from 0 to 1.
        layer_of: Path -> name of its layer; "" for leaves that stay as they are (running statistics).
        batch_size: Examples of one perturbation; the last batch may be smaller.

    Raises:
        DataError: no labelled examples.
        ConfigError: `radius` or `num_steps` not positive.
        TreeMismatchError: the trees differ in a path or a shape.
    """
    _check(sample)
    if not radius > 0 or num_steps < 1:
        raise ConfigError(f"radius is {radius} and num_steps {num_steps}; both must be positive.")
    check_same({"first": first, "second": second})
    weights = np.linspace(0, 1, NUM_POINTS) if weights is None else np.asarray(weights, np.float64)
    layers = layers_of(first, layer_of)
    names = tuple(layers)
    # Which layer is perturbed is data, so that all layers share one program: float32[layers + 1], the last row is all.
    chosen = np.concatenate([np.eye(len(names)), np.ones((1, len(names)))]).astype(np.float32)
    number = {path: names.index(name) for name, paths in layers.items() for path in paths}
    values, losses, total = np.zeros((len(weights), len(chosen))), np.zeros(len(weights)), 0.0
    for chunk in sample.chunks(min(batch_size, len(sample))):
        found, loss = _ascend(
            sample.forward, tuple(sorted(number.items())), num_steps, first, second,
            weights.astype(np.float32), chosen, np.float32(radius), chunk,
        )  # fmt: skip
        share = float(chunk["weight"].sum())
        values += share * np.asarray(found, np.float64)
        losses += share * np.asarray(loss, np.float64)
        total += share
    values, losses = values / total, losses / total
    return Sharpness(weights, names, values[:, :-1], values[:, -1], losses)


def measure_layer_barriers(
    first: Params,
    second: Params,
    sample: Sample,
    *,
    num_points: int = NUM_POINTS,
    layer_of: Callable[[str], str] = first_component,
    batch_size: int = 256,
) -> dict[str, Barrier]:
    """The barrier of the loss while one layer alone moves from `first` to `second`, the others staying with `second`.

    Raises:
        DataError: no labelled examples.
        TreeMismatchError: the trees differ in a path or a shape.
    """
    _check(sample)
    check_same({"first": first, "second": second})
    layers, points = layers_of(first, layer_of), np.linspace(0, 1, num_points)
    names = tuple(layers)
    number = tuple(sorted((path, names.index(name)) for name, paths in layers.items() for path in paths))
    losses = np.zeros((len(names), num_points))
    for chunk in sample.chunks(min(batch_size, len(sample))):
        found = _move_layers(sample.forward, number, first, second, points.astype(np.float32), len(names), chunk)
        losses += np.asarray(found, np.float64) * chunk["weight"].sum()
    return {name: measure_barrier(points, row / len(sample)) for name, row in zip(names, losses, strict=True)}


def find_stragglers(
    first: Params, second: Params, sample: Sample, *, count: int = 1, criterion: str = "sharpness", **options: Any
) -> tuple[list[str], dict[str, float]]:
    """(the `count` layers with the largest peak, worst first; the peaks of all).

    Args:
        first, second, sample: As `measure_sharpness`.
        count: How many.
        criterion: "sharpness", or "barrier".
        **options: Of `measure_sharpness` or `measure_layer_barriers`.

    Raises:
        UnknownNameError: no such criterion.
        ConfigError: more stragglers than layers, or none.
    """
    if criterion not in CRITERIA:
        raise unknown_name("criterion of stragglers", criterion, CRITERIA)
    names = layers_of(first, options.get("layer_of", first_component))
    if not 0 < count <= len(names):
        raise ConfigError(f"count is {count}; there are {len(names)} layers, {', '.join(names)}.")
    if criterion == "sharpness":
        peaks = measure_sharpness(first, second, sample, **options).peaks
    else:
        barriers = measure_layer_barriers(first, second, sample, **options)
        peaks = {name: barrier.height for name, barrier in barriers.items()}
    return sorted(peaks, key=lambda name: -peaks[name])[:count], peaks


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing one; NaN where a list is constant.

    Raises:
        ConfigError: lengths differ, or below 2.
    """
    from scipy.stats import rankdata

    if len(first) != len(second) or len(first) < 2:
        raise ConfigError(
            f"a correlation needs two lists of one length, 2 or more; got {len(first)} and {len(second)}."
        )
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (first, second)]
    norm = np.sqrt(np.sum(ranks[0] ** 2) * np.sum(ranks[1] ** 2))
    return float(np.sum(ranks[0] * ranks[1]) / norm) if norm else float("nan")


def layers_of(params: Params, layer_of: Callable[[str], str] = first_component) -> dict[str, list[str]]:
    """Layer -> paths of its float leaves, in the order of the tree; a leaf whose layer is "" is in none."""
    layers: dict[str, list[str]] = {}
    for path, leaf in flatten(params).items():
        if is_float(leaf) and layer_of(path):
            layers.setdefault(layer_of(path), []).append(path)
    return layers


def _check(sample):
    if not len(sample) or not sample.is_labelled:
        raise DataError(f"{sample.name}: a loss needs labelled examples, and here are none.")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ascend(forward, number, num_steps, first, second, weights, chosen, radius, batch):
    """(float32[points, layers + 1] of how far the loss climbs, float32[points] of where it starts)."""
    number = dict(number)

    def loss_of(floats, rest):
        return weighted_mean(example_losses(forward(unflatten({**rest, **floats}), batch), batch), batch)

    def norm_of(leaves, factors):
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) * factors[number[path]] for path, leaf in leaves.items()))

    def at(weight):
        flat = flatten(interpolate_linear(first, second, weight))
        start = {path: leaf.astype(jnp.float32) for path, leaf in flat.items() if path in number}
        rest = {path: leaf for path, leaf in flat.items() if path not in number}
        lowest = loss_of(start, rest)

        def climb(factors):
            limit = radius * norm_of(start, factors)

            def step(change, _):
                moved = {path: start[path] + change[path] for path in start}
                loss, slope = jax.value_and_grad(loss_of)(moved, rest)
                length = limit / jnp.maximum(norm_of(slope, factors), 1e-30)
                change = {p: factors[number[p]] * (leaf + length * slope[p]) for p, leaf in change.items()}
                shrink = jnp.minimum(1.0, limit / jnp.maximum(norm_of(change, factors), 1e-30))
                return {path: shrink * leaf for path, leaf in change.items()}, loss

            nothing = {path: jnp.zeros_like(leaf) for path, leaf in start.items()}
            change, losses = jax.lax.scan(step, nothing, None, length=num_steps)
            last = loss_of({path: start[path] + change[path] for path in start}, rest)
            return jnp.maximum(jnp.max(losses), last) - lowest

        return jnp.maximum(jax.lax.map(climb, chosen), 0.0), lowest

    return jax.lax.map(at, weights)


@partial(jax.jit, static_argnums=(0, 1, 5))
def _move_layers(forward, number, first, second, points, num_layers, batch):
    """float32[layers, points]."""
    number = dict(number)
    ours, theirs = flatten(first), flatten(second)

    def at(layer, weight):
        mixed = flatten(interpolate_linear(first, second, weight))
        params = {
            path: jnp.where(layer == number[path], mixed[path], leaf) if path in number else ours[path]
            for path, leaf in theirs.items()
        }
        return weighted_mean(example_losses(forward(unflatten(params), batch), batch), batch)

    layers = jnp.arange(num_layers, dtype=jnp.int32)
    return jax.lax.map(lambda layer: jax.lax.map(lambda weight: at(layer, weight), points), layers)
