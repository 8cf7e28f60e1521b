"""How good a model is, in numbers."""

from jaxtune.evaluate.candidates import (
    Candidates,
    combine_candidates,
    line_candidates,
    mix_candidates,
    stack_candidates,
)
from jaxtune.evaluate.classifier import Metrics, calibration_error, evaluate_classifier, score_batch
from jaxtune.evaluate.many import ClassScores, evaluate_many, score_many
from jaxtune.evaluate.sweep import evaluate_scales

__all__ = [
    "Candidates",
    "ClassScores",
    "Metrics",
    "calibration_error",
    "combine_candidates",
    "evaluate_classifier",
    "evaluate_many",
    "evaluate_scales",
    "line_candidates",
    "mix_candidates",
    "score_batch",
    "score_many",
    "stack_candidates",
]
