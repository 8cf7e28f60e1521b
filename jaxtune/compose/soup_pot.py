"""What soups are made of and measured by: ingredients, rows of weights over them, and a metric."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxtune.compose.vectors import narrow
from jaxtune.errors import ConfigError, DataError, NonFiniteError, TreeMismatchError, unknown_name
from jaxtune.evaluate.candidates import mix_candidates, one_candidate, stack_candidates
from jaxtune.evaluate.language import evaluate_sample
from jaxtune.interpolate.repair import Observe, find_norms, reset_statistics
from jaxtune.models import registry
from jaxtune.sample import Sample, inputs_of
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Params

# Parameters -> a number.
Metric = Callable[[Params], float]
MODES = ("max", "min")
METRICS = {"accuracy": "max", "balanced_accuracy": "max", "loss": "min", "calibration_error": "min"}
TEXT_METRICS = {"accuracy": "max", "loss": "min", "perplexity": "min"}
STATISTICS_BATCH = 128  # examples that a batch norm takes its statistics from at a time


class Pot:
    """Models, and how good averages of them are.

    Args:
        models: The ingredients.
        sample: What named metrics are measured on, and where batch norms get their statistics; None with a function.
        metric: A key of `METRICS`, for language models of `TEXT_METRICS`, or a function of parameters.
        mode: "max", "min", or None: the metric's own.
    """

    def __init__(self, models: Sequence[Params], sample: Sample | None, metric: str | Metric, mode: str | None):
        known = TEXT_METRICS if _is_text(sample) else METRICS
        if isinstance(metric, str):
            if metric not in known:
                raise unknown_name("metric", metric, known)
            if sample is None or not len(sample) or not sample.is_labelled:
                raise DataError(f"{sample.name if sample else 'a soup'}: {metric} needs labelled examples.")
        if mode is not None and mode not in MODES:
            raise unknown_name("mode", mode, MODES)
        self.mode = mode or (known[metric] if isinstance(metric, str) else "max")
        self._models, self._sample, self._metric = list(models), sample, metric
        self._observe = observe_of(models[0], sample)
        self._mixed = mix_candidates(models, np.eye(len(models)))

    @property
    def num_models(self) -> int:
        """Ingredients."""
        return len(self._models)

    def score_models(self) -> list[float]:
        """Of every ingredient as it is."""
        if isinstance(self._metric, str):
            return self._named(stack_candidates(self._models))
        return [self._asked(model) for model in self._models]

    def lead_with(self, model: int) -> None:
        """Leaves that are no floats are this model's from now on, in every average."""
        fixed = mix_candidates([self._models[model]], np.ones((1, 1))).shared["fixed"]
        self._mixed = dataclasses.replace(self._mixed, shared={**self._mixed.shared, "fixed": fixed})

    def score(self, rows: Sequence[np.ndarray]) -> list[float]:
        """Of averages, by their weights: float64[models] each."""
        mixed = dataclasses.replace(self._mixed, own=np.stack(rows))
        if isinstance(self._metric, str) and self._observe is None:
            return self._named(mixed)
        found = []
        for n, weights in enumerate(rows):
            params = self._mend(mixed.take(n), weights)
            named = isinstance(self._metric, str)
            found.append(self._named(one_candidate(params))[0] if named else self._asked(params))
        return found

    def make(self, weights: np.ndarray, like: Params) -> dict[str, Any]:
        """One average as parameters, in the dtypes of `like`."""
        lead = self._mixed.shared["fixed"]
        params = self._mend(dataclasses.replace(self._mixed, own=weights[None]).take(0), weights)
        made = narrow(jax.tree.map(np.asarray, params), like)
        return _with_leaves(made, lead)

    def _mend(self, params, weights):
        """A model that is alone keeps its own statistics."""
        return params if np.count_nonzero(weights) == 1 else mend_statistics(self._observe, params, self._sample)

    def _named(self, candidates):
        return [getattr(one, self._metric) for one in evaluate_sample(candidates, self._sample)]

    def _asked(self, params):
        score = float(self._metric(params))
        if np.isnan(score):
            raise NonFiniteError("the metric of a candidate soup is NaN.")
        return score


def mend_statistics(observe: Observe | None, params: Params, sample: Sample | None) -> Params:
    """Statistics of batch norms as the examples give them; `params` as they are where `observe` is None."""
    if observe is None:
        return params
    inputs = inputs_of(sample.batch)
    starts = range(0, len(sample), STATISTICS_BATCH)
    batches = [{name: x[start : start + STATISTICS_BATCH] for name, x in inputs.items()} for start in starts]
    return reset_statistics(observe, params, batches)


def average(models: Sequence[int], num_models: int) -> np.ndarray:
    """float64[num_models]: the same weight for each of some models."""
    weights = np.zeros(num_models)
    weights[list(models)] = 1 / len(models)
    return weights


def order_of(scores: Sequence[float], mode: str) -> list[int]:
    """Best first; equal ones in the order in which they came."""
    signed = np.asarray(scores, np.float64) * (-1 if mode == "max" else 1)
    return np.argsort(signed, kind="stable").tolist()


def is_better(score: float, best: float, mode: str) -> bool:
    """Whether strictly so."""
    return score > best if mode == "max" else score < best


def observe_of(params: Params, sample: Sample | None) -> Observe | None:
    """What batch norms see, for `interpolate.repair`; None in a network without them, or without examples.

    Raises:
        ConfigError: the sample does not say what network it is of.
    """
    try:
        find_norms(params)
    except TreeMismatchError:
        return None
    if sample is None:
        return None
    config = getattr(sample.forward, "config", None)
    if config is None:
        raise ConfigError(f"{sample.name}: averages of batch norms need the config; a sample of make_sample has it.")
    return functools.partial(_observe, config)


@functools.partial(jax.jit, static_argnums=0, static_argnames="is_training")
def _observe(config, params, batch, *, is_training):
    return registry.observe_norms(config, params, batch, is_training=is_training)


def _is_text(sample):
    return sample is not None and sample.is_labelled and sample.batch["label"].ndim == 2


def _with_leaves(params, leaves):
    return unflatten({**flatten(params), **{path: np.asarray(leaf) for path, leaf in leaves.items()}})
