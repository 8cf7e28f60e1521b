"""Whether two sets of weights compute the same function, measured and not assumed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.tree import is_float, map_leaves
from jaxtune.types import Leaf, Params

# Rounding through a network in float32 stays well below this share of the outputs' own size.
EXACT = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-10}


@dataclass(frozen=True)
class Equivalence:
    """How far the outputs of two networks are apart on one batch.

    Attributes:
        max_relative: Largest output difference, over the root mean square of the first one's outputs.
        mean_relative: Mean absolute output difference, over the same.
        kl: Mean Kullback-Leibler divergence of the softmaxed outputs, in nats.
        argmax_agreement: Share of inputs with the same largest output; where an output is NaN there is none.
        is_exact: Whether `max_relative` is rounding: at most 1e-4 in float32, 1e-10 in float64. Never with NaN or Inf.
        num_examples: Size of the batch.
    """

    max_relative: float
    mean_relative: float
    kl: float
    argmax_agreement: float
    is_exact: bool
    num_examples: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for `report.json`."""
        return asdict(self)


def compare_outputs(first: jax.Array, second: jax.Array) -> Equivalence:
    """Compares two batches of outputs.

    Shapes:
        first, second: float[N, K], N and K at least 1.

    Raises:
        ValueError: the shapes differ or a batch is empty.
    """
    first, second = (np.asarray(outputs) for outputs in (first, second))
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(f"outputs must be two batches of one shape, got {first.shape} and {second.shape}")
    tolerance = EXACT.get(first.dtype, EXACT[np.dtype(np.float32)])
    first, second = first.astype(np.float64), second.astype(np.float64)
    has_nan = np.isnan(first).any(axis=-1) | np.isnan(second).any(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf go through, into the numbers
        scale = max(float(np.sqrt(np.mean(first**2))), np.finfo(np.float64).tiny)
        difference = np.abs(first - second)
        log_p, log_q = _log_softmax(first), _log_softmax(second)
        max_relative = float(difference.max() / scale)
        return Equivalence(
            max_relative=max_relative,
            mean_relative=float(difference.mean() / scale),
            kl=max(float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))), 0.0),
            argmax_agreement=float(np.mean((first.argmax(-1) == second.argmax(-1)) & ~has_nan)),
            is_exact=max_relative <= tolerance,  # False for NaN
            num_examples=len(first),
        )


def check_equivalence(
    apply: Callable[[Params, Mapping[str, Any]], jax.Array], first: Params, second: Params, batch: Mapping[str, Any]
) -> Equivalence:
    """Runs both sets of weights on `batch` and compares what comes out.

    Weights in float16 or bfloat16 are widened to float32 first: a network computes in the dtype of its weights, and
    sums taken in another order differ by far more there than any tolerance that would still tell networks apart.

    Args:
        apply: (params, batch) -> float[N, K]; jitted already where that pays.
        first, second: Weights; `first` sets the scale.
        batch: Inputs for `apply`.
    """
    return compare_outputs(*(apply(map_leaves(_widen, params, dtype=_wide_dtype), batch) for params in (first, second)))


def _widen(path: str, leaf: Leaf) -> Leaf:
    return leaf.astype(_wide_dtype(path, leaf))


def _wide_dtype(path: str, leaf: Leaf) -> np.dtype:
    return np.dtype(np.float32) if is_float(leaf) and leaf.dtype.itemsize < 4 else np.dtype(leaf.dtype)


def _log_softmax(x):
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
