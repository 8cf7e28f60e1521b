"""How good a model is, in numbers."""

from jaxtune.evaluate.classifier import Metrics, calibration_error, evaluate_classifier, score_batch
from jaxtune.evaluate.sweep import evaluate_scales

__all__ = ["Metrics", "calibration_error", "evaluate_classifier", "evaluate_scales", "score_batch"]
