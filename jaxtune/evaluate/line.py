"""The line between two models, measured: its barrier, and what becomes of accuracy on the way."""

from dataclasses import dataclass

import numpy as np

from jaxtune.errors import ConfigError, DataError
from jaxtune.evaluate.candidates import line_candidates
from jaxtune.evaluate.classifier import Metrics
from jaxtune.evaluate.language import TextMetrics, evaluate_sample
from jaxtune.interpolate.barrier import NUM_POINTS, Barrier, measure_barrier
from jaxtune.sample import Sample
from jaxtune.types import Params


@dataclass(frozen=True)
class Line:
    """Every point that was measured between two models.

    Attributes:
        barrier: Of the loss: height and place of the worst point, and all losses, those of both ends among them.
        metrics: At `barrier.weights`.
    """

    barrier: Barrier
    metrics: tuple[Metrics, ...] | tuple[TextMetrics, ...]

    @property
    def end_losses(self) -> tuple[float, float]:
        """Of the first and the second model."""
        return self.barrier.losses[0], self.barrier.losses[-1]


def evaluate_line(
    first: Params, second: Params, sample: Sample, *, num_points: int = NUM_POINTS, nonnegative: tuple[str, ...] = ()
) -> Line:
    """Measures evenly spaced points from `first` to `second`, in one program.

    Args:
        first, second: Two models of one architecture, aligned beforehand where they need it.
        sample: Labelled examples, or texts as `sampling.make_text_sample` gives them.
        num_points: Both ends counted; at least 3.
        nonnegative: As in `candidates.mix_candidates`.

    Raises:
        ConfigError: too few points.
        TreeMismatchError: the trees differ in a path or a shape.
        DataError: no labelled examples; as `evaluate_many`.
        NonFiniteError: a model on the line gives NaN.

    Reference:
        Frankle et al. 2020, arXiv:1912.05671: the worst point counts, not the middle.
    """
    if num_points < 3:
        raise ConfigError(f"num_points is {num_points}; a barrier needs at least 3: two ends and what lies between.")
    if not len(sample) or not sample.is_labelled:
        raise DataError(f"{sample.name}: a loss needs labelled examples, and here are none.")
    weights = np.linspace(0, 1, num_points)
    points = line_candidates(first, second, weights, nonnegative=nonnegative)
    metrics = evaluate_sample(points, sample)
    return Line(measure_barrier(weights, [one.loss for one in metrics]), tuple(metrics))
