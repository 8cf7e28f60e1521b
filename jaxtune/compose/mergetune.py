"""MERGETUNE: tunes a fine-tuned model on, so that it lies on lines of low loss to both of its parents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compose.composition import Composition, check_models
from jaxtune.compose.fitting import Recipe, check_labelled, fit, join, narrow, split
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.evaluate.line import evaluate_line
from jaxtune.models.readout import normalise_features, read_out
from jaxtune.sample import Sample, example_losses, weighted_mean
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.tree import check_same, flatten
from jaxtune.types import Params

SPACES = ("weights", "features")
POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)
PULL = {"weights": 1.0, "features": 10.0}


@own_states()
def mergetune(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    space: str = "weights",
    pull: float | None = None,
    line: float = 1.0,
    points: Sequence[float] = POINTS,
    fisher: Params | None = None,
    num_steps: int = 200,
    learning_rate: float = 2e-3,
    batch_size: int = 32,
    optimizer: str = "sgd",
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """`min_w CE(w) + μ D(w, w1) + λ mean_t CE(w2 + t (w - w2))`, from the fine-tuned w2, with w1 the base.

    The mean over t keeps the line from w2 to w low; D stands for the loss of pre-training along the line from w1 to w,
    which nobody has the data for.

    Args:
        base: w1, the zero-shot model.
        finetuned: w2 alone.
        samples: One, labelled.
        space: "weights": D is `½ |w - w1|²` and the line is between weights. "features": D is one minus the mean cosine
            of the features of w and w1 on the batch, and the line is between the features of w2 and of w.
        pull: μ; None: 1 for weights, 10 for features.
        line: λ.
        points: t, each in (0, 1); at 1 the line would repeat CE(w).
        fisher: Diagonal metric of D, not negative, a tree as the base: `½ Σ F (w - w1)²`. Of "weights" alone.
        num_steps, learning_rate, batch_size, optimizer: Of the training; a cosine to 0.
        seed: Of the order of the examples.
        series: Where the states are kept.

    Returns:
        The model. `info`: "loss" of every step, and for either parent the "barrier_to_base" and "barrier_to_finetuned"
        of w, and "barrier_of_parents", 25 points on the sample each.

    Raises:
        UnknownNameError: no such space.
        ConfigError: not one fine-tuned model, or a number out of range.
        DataError: no labels.

    Reference:
        Wang et al. 2026, arXiv:2601.10497, as its CoOp release has it: μ = 10, λ = 1, five t, SGD 2e-3 with a cosine.
        Differs: "weights", ours, takes line and pull between the parameters of the network. `½ |w - w1|²` is a sum over
        all of them and grows with their number where a mean of cosines does not, hence its smaller μ; the length is in
        steps.
    """
    if space not in SPACES:
        raise unknown_name("space", space, SPACES)
    check_models(base, finetuned)
    if len(finetuned) != 1 or len(samples) != 1:
        raise ConfigError(f"mergetune tunes one model on one sample, got {len(finetuned)} and {len(samples)}.")
    pull = PULL[space] if pull is None else pull
    points = tuple(float(t) for t in points)
    if pull < 0 or line < 0 or any(not 0 < t < 1 for t in points):
        raise ConfigError(f"pull {pull} and line {line} must not be negative, points {points} must lie in (0, 1).")
    if fisher is not None and space != "weights":
        raise ConfigError("fisher= is a metric of weights; space is 'features'.")
    sample, tuned = samples[0], finetuned[0]
    check_labelled(sample, "mergetune")
    start, still = split(tuned, sample)
    first = {path: leaf for path, leaf in split(base, sample)[0].items() if path in start}
    fixed = {"still": still, "first": first, "second": start, "pull": np.float32(pull), "line": np.float32(line)}
    if space == "features":
        fixed["first_still"] = {path: leaf for path, leaf in flatten(base).items() if path not in start}
    if fisher is not None:
        check_same({"base": base, "fisher": fisher})
        fixed["metric"] = {
            path: np.asarray(leaf, np.float32) for path, leaf in flatten(fisher).items() if path in start
        }
        if any((leaf < 0).any() or not np.isfinite(leaf).all() for leaf in fixed["metric"].values()):
            raise ConfigError("fisher holds numbers that are negative or not finite; a metric has none.")
    found = fit(
        Loss(space, points), start, fixed, sample, seed=seed, series=series,
        recipe=Recipe(num_steps, learning_rate, batch_size, optimizer),
    )  # fmt: skip
    params = narrow({**found.numbers, **still}, tuned)
    ends = {
        "barrier_to_base": (base, params),
        "barrier_to_finetuned": (tuned, params),
        "barrier_of_parents": (base, tuned),
    }
    barriers = {name: evaluate_line(*pair, sample).barrier for name, pair in ends.items()}
    info: dict[str, Any] = {"loss": found.losses, "pull": pull}
    for name, barrier in barriers.items():
        info |= {name: barrier.height, f"{name}_at": barrier.weight}
    return Composition(params, info)


@dataclass(frozen=True)
class Loss:
    """The objective, hashable; see `mergetune`. What it weighs its terms by is among the fixed arrays."""

    space: str
    points: tuple[float, ...]

    def __call__(
        self, forward: Any, numbers: Mapping[str, Any], fixed: Any, batch: Mapping[str, Any], key: jax.Array
    ) -> jax.Array:
        del key
        if self.space == "features":
            return self._in_features(forward, numbers, fixed, batch)

        def loss_at(t):
            mixed = {path: old + t * (numbers[path] - old) for path, old in fixed["second"].items()}
            return weighted_mean(example_losses(forward(join(mixed, fixed["still"]), batch), batch), batch)

        # The network itself is the point t = 1: one loop, and so one compiled pass, for all.
        losses = jax.lax.map(loss_at, jnp.asarray([1.0, *self.points], jnp.float32))
        return losses[0] + fixed["pull"] * _distance(numbers, fixed) + _mean_line(losses, fixed)

    def _in_features(self, forward, numbers, fixed, batch):
        embeddings = getattr(forward, "embeddings", None)
        features_of = forward if embeddings is None else replace(forward, embeddings=None)
        ours = features_of(join(numbers, fixed["still"]), batch)
        others = features_of(join(fixed["first"], fixed["first_still"]), batch)
        theirs = features_of(join(fixed["second"], fixed["still"]), batch)
        cosine = jnp.sum(normalise_features(ours) * normalise_features(others), axis=-1)

        def loss_at(t):
            mixed = theirs + t * (ours - theirs)
            logits = mixed if embeddings is None else read_out(mixed, embeddings.array)
            return weighted_mean(example_losses(logits, batch), batch)

        losses = jax.lax.map(loss_at, jnp.asarray([1.0, *self.points], jnp.float32))
        if cosine.ndim > 1:
            cosine = jnp.mean(cosine, axis=tuple(range(1, cosine.ndim)))
        return losses[0] + fixed["pull"] * (1.0 - weighted_mean(cosine, batch)) + _mean_line(losses, fixed)


def _distance(numbers, fixed):
    metric = fixed.get("metric", {})
    return 0.5 * sum(
        jnp.sum(metric.get(path, jnp.float32(1.0)) * jnp.square(leaf - fixed["first"][path]))
        for path, leaf in numbers.items()
    )


def _mean_line(losses, fixed):
    """λ times the mean behind the first, which is that of the network itself."""
    return fixed["line"] * jnp.mean(losses[1:]) if len(losses) > 1 else jnp.float32(0.0)
