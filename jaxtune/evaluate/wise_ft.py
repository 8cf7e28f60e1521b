"""WiSE-FT: the line from a zero-shot model to its fine-tune, in and out of distribution."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.evaluate.candidates import line_candidates
from jaxtune.evaluate.classifier import Metrics, check_classes, metrics_of
from jaxtune.evaluate.many import ClassScores, score_many
from jaxtune.sample import Sample
from jaxtune.types import Params

ALPHAS = tuple(float(x) for x in np.linspace(0, 1, 11).round(2))


@dataclass(frozen=True)
class Split:
    """The line on one sample.

    Attributes:
        metrics: At every alpha.
        both_wrong: Share of examples that both ends get wrong and the model at alpha right (false, false, true).
        both_right: Share that both ends get right and the model at alpha wrong (true, true, false).
        confidence: Mean probability of the most probable class, of the zero-shot and of the fine-tuned model.
        ends: Metrics of the two.
    """

    metrics: tuple[Metrics, ...]
    both_wrong: tuple[float, ...]
    both_right: tuple[float, ...]
    confidence: tuple[float, float]
    ends: tuple[Metrics, Metrics]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """At every alpha."""
        return tuple(one.accuracy for one in self.metrics)


@dataclass(frozen=True)
class WiseCurve:
    """The line on every sample.

    Attributes:
        alphas: 0 is the zero-shot model, 1 the fine-tuned one.
        is_outside: Whether each alpha is beyond an end, where a model is extrapolated.
        splits: Name of a sample -> the line on it.
    """

    alphas: tuple[float, ...]
    is_outside: tuple[bool, ...]
    splits: dict[str, Split]

    def choose(self, split: str) -> float:
        """The alpha with the greatest accuracy on one sample, the first of equals; validation data is for that.

        Raises:
            UnknownNameError: no such sample; nothing else is taken in its place.
        """
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        return self.alphas[int(np.argmax(self.splits[split].accuracies))]


def trace_wise_ft(
    zero_shot: Params,
    finetuned: Params,
    samples: Mapping[str, Sample],
    *,
    alphas: Sequence[float] = ALPHAS,
    top_k: int = 5,
) -> WiseCurve:
    """Measures `(1 - α) zero_shot + α finetuned` on several samples: in distribution, out of it.

    Args:
        zero_shot, finetuned: Two models of one tree; the head of classes is a leaf of both, or a frozen read-out.
        samples: Name -> labelled examples.
        alphas: In any order; outside [0, 1] the line goes on, and the result says so.
        top_k: Of the metrics.

    Raises:
        ConfigError: no sample, or `alphas` is empty or not finite.
        TreeMismatchError: the trees differ in a path or a shape.
        DataError: as `evaluate_many`; a sample of texts among them, whose tokens are no examples to count.
        NonFiniteError: as `evaluate_many`.

    Reference:
        Wortsman et al. 2022, arXiv:2109.01903; the shares of examples that only the average gets right or wrong as in
        Lin et al. 2024, arXiv:2309.17230 (false-false-true).
    """
    if not samples:
        raise ConfigError("there is no sample to measure the line on.")
    alphas = np.asarray(alphas, np.float64)
    if alphas.ndim != 1 or not len(alphas):
        raise ConfigError(f"alphas must be a list of at least one number, got shape {alphas.shape}.")
    candidates = line_candidates(zero_shot, finetuned, np.concatenate([alphas, [0.0, 1.0]]))
    splits = {}
    for name, sample in samples.items():
        check_classes(sample)
        scores = score_many(candidates, ClassScores(sample.forward), sample)
        each = [{key: values[n] for key, values in scores.items()} for n in range(len(candidates))]
        metrics = tuple(metrics_of(one, top_k=top_k) for one in each)
        *middle, first, second = scores["rank"] == 0
        confidence = scores["confidence"].astype(np.float64).mean(axis=1)
        splits[name] = Split(
            metrics=metrics[:-2],
            both_wrong=tuple(float(np.mean(right & ~first & ~second)) for right in middle),
            both_right=tuple(float(np.mean(~right & first & second)) for right in middle),
            confidence=(float(confidence[-2]), float(confidence[-1])),
            ends=metrics[-2:],
        )
    outside = (alphas < 0) | (alphas > 1)
    return WiseCurve(tuple(alphas.tolist()), tuple(outside.tolist()), splits)
