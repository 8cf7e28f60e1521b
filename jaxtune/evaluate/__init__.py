"""How good a model is, in numbers."""

from jaxtune.evaluate.classifier import Metrics, calibration_error, evaluate_classifier, score_batch

__all__ = ["Metrics", "calibration_error", "evaluate_classifier", "score_batch"]
