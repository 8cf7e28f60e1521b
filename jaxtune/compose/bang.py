"""BANG: a fine-tune that is not surer of itself than its base, so that neither drowns the other in their average."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune.compose.composition import Composition
from jaxtune.compose.fitting import Recipe, check_labelled, fit, join, narrow, split
from jaxtune.compose.measuring import measure
from jaxtune.errors import ConfigError
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.sample import Sample, example_losses, weighted_mean
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.train.step import mix_images
from jaxtune.tree import check_finite
from jaxtune.types import Params


@own_states("weight", "reports")
def bang(
    base: Params,
    sample: Sample,
    *,
    label_smoothing: float = 0.1,
    mixup: float = 0.0,
    weight: float = 0.5,
    recipe: Recipe | None = None,
    reports: Sequence[Sample] = (),
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """Fine-tunes with smoothed labels, mixed images or both, and averages with the base as WiSE-FT does.

    A fine-tune is over-confident away from its data; in the average its logits, and so its mistakes, then outweigh
    those of the base. `experiments.finetune` has the same two options for longer runs.

    Args:
        base: The zero-shot model.
        sample: Labelled examples to fine-tune on.
        label_smoothing: Share of each target that is spread evenly over the classes, or tokens.
        mixup: α of Beta(α, α); 0 mixes nothing. Images only.
        weight: Of the fine-tune in the average.
        recipe: How to train; None: `Recipe()`.
        reports: Labelled samples to report on, from the task and away from it.
        seed: Of the order and the mixing.
        series: Where states are kept.

    Returns:
        The average. `info["reports"]`: sample's name -> "base", "finetuned", "average" -> accuracy, loss, mean
        confidence (probability of the most probable class) and calibration error; `info["loss"]` of every step.
        `coefficients`: the fine-tune before it was averaged.

    Raises:
        ConfigError: a number out of range.
        DataError: no labels, or `mixup` of texts.

    Reference:
        Lin et al. 2024, arXiv:2309.17230. The settings are ours: the paper's were not at hand.
    """
    check_labelled(sample, "bang")
    check_finite("base", base)
    if not 0 <= label_smoothing < 1 or mixup < 0:
        raise ConfigError(f"label_smoothing {label_smoothing} must lie in [0, 1), mixup {mixup} must not be negative.")
    moving, still = split(base, sample)
    found = fit(
        Smoothed(label_smoothing, mixup), moving, still, sample, recipe=recipe or Recipe(), seed=seed, series=series
    )
    finetuned = narrow({**found.numbers, **still}, base)
    average = interpolate_linear(base, finetuned, weight)
    models = {"base": base, "finetuned": finetuned, "average": average}
    info = {"loss": found.losses, "reports": report_confidence(models, reports)}
    return Composition(average, info, finetuned)


def report_confidence(
    models: Mapping[str, Params], samples: Sequence[Sample]
) -> dict[str, dict[str, dict[str, float]]]:
    """Sample's name -> model's name -> accuracy, loss, mean confidence, calibration error."""
    return {sample.name: {name: measure(params, sample) for name, params in models.items()} for sample in samples}


@dataclass(frozen=True)
class Smoothed:
    """The objective: cross-entropy to smoothed labels, of mixed images; hashable."""

    label_smoothing: float
    mixup: float

    def __call__(
        self, forward: Any, numbers: Mapping[str, Any], fixed: Any, batch: Mapping[str, Any], key: jax.Array
    ) -> jax.Array:
        others, share = None, 1.0
        if self.mixup:
            batch, others, share = mix_images(key, batch, self.mixup)
        logits = forward(join(numbers, fixed), batch)
        loss = self._loss(logits, batch)
        if others is not None:
            loss = share * loss + (1 - share) * self._loss(logits, {**batch, "label": others})
        return loss

    def _loss(self, logits, batch):
        return weighted_mean(example_losses(logits, batch, label_smoothing=self.label_smoothing), batch)
