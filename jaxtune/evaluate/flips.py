"""What changes for the single example when one model takes the place of another."""

from dataclasses import dataclass

import numpy as np

from jaxtune.errors import DataError
from jaxtune.evaluate.candidates import Candidates, one_candidate
from jaxtune.evaluate.classifier import check_classes, check_scores
from jaxtune.evaluate.many import ClassScores, score_many
from jaxtune.sample import Sample
from jaxtune.types import Params


@dataclass(frozen=True)
class Flips:
    """Examples that a new model gets otherwise than the one it replaces.

    Attributes:
        negative: Share of all examples that the old model gets right and the new one wrong.
        positive: Share that the old one gets wrong and the new one right; accuracy grows by the difference.
        num_examples: All of them.
    """

    negative: float
    positive: float
    num_examples: int


def count_flips(old: np.ndarray, new: np.ndarray) -> Flips:
    """Flips of two models on the same examples.

    Shapes:
        old, new: bool[N], whether each example is right.

    Raises:
        DataError: there are no examples, or not the same number.

    Reference:
        Yan et al. 2021, arXiv:2011.09161 (negative flip rate).
    """
    old, new = np.asarray(old, bool), np.asarray(new, bool)
    if old.ndim != 1 or old.shape != new.shape or not len(old):
        raise DataError(f"flips compare two models on the same examples, got shapes {old.shape} and {new.shape}.")
    return Flips(float(np.mean(old & ~new)), float(np.mean(~old & new)), len(old))


def measure_flips(old: Params, candidates: Candidates, sample: Sample) -> list[Flips]:
    """Flips of every candidate against one model.

    Args:
        old: The model that would be replaced.
        candidates: What might replace it.
        sample: Labelled examples, one label each.

    Raises:
        DataError, NonFiniteError: as `evaluate_many`.
    """
    check_classes(sample)
    right = []
    for models in (one_candidate(old), candidates):
        scores = score_many(models, ClassScores(sample.forward), sample)
        for n in range(len(models)):
            check_scores({name: values[n] for name, values in scores.items()})
        right.append(scores["rank"] == 0)
    return [count_flips(right[0][0], one) for one in right[1]]
