"""Merging by least squares, with the inputs' covariances read off the task vectors themselves: WUDI and ACE."""

from typing import Any

import numpy as np

from jaxtune.merge.factors import (
    add_matrix,
    check_others,
    each_matrix,
    is_matrix,
    merge_others,
    sum_matrices,
    top_factors,
)
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between, check_choice
from jaxtune.merge.polar import multiply
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_wudi(
    view: View,
    *,
    solver: str = "closed",
    ridge: float = 1e-4,
    num_steps: int = 300,
    learning_rate: float = 1e-5,
    equal_norms: bool = False,
    lambda_: float = 1.0,
    others: str = "average",
) -> Combine:
    """`θ_0 + λ M`, M nearest to the least of `Σ_t ‖(M - τ_t) τ_tᵀ‖² / ‖τ_t‖²`: on each task's inputs as τ_t.

    With `G_t = τ_tᵀ τ_t / ‖τ_t‖²` and S = Σ τ_t, "closed" is `M = (Σ τ_t G_t + ρ S)(Σ G_t + ρ I)⁻¹`, ρ the `ridge`
    times the mean eigenvalue of `Σ G_t`: where no task has inputs, M is S. "iterative" is Adam from S.

    Args:
        view: Of the models.
        solver: "closed" or "iterative".
        ridge: Of the closed form.
        num_steps: Of Adam.
        learning_rate: Of Adam: no entry moves by more than about this in a step, whatever the task vectors' length.
        equal_norms: Whether task vectors are brought to their mean length before; unequal ones cost much accuracy.
        lambda_: Scale.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Cheng et al. 2025, arXiv:2503.08099 (300 steps at 1e-5, from the sum). The closed
        form is merge-and-rebase's, whose ridge of 1e-8 pulls to zero and not to S.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    constants = {"input_axis": view.input_axis, "solver": solver, "num_steps": num_steps, "equal_norms": equal_norms}
    return Combine(_merge_wudi, (ridge, learning_rate, lambda_), tuple(constants.items()))


def merge_ace(
    view: View,
    *,
    solver: str = "closed",
    epsilon: float = 1e-2,
    heterogeneity: float = 0.3,
    refined_share: float = 0.3,
    centre_updates: bool = False,
    num_steps: int = 300,
    learning_rate: float = 1e-4,
    lambda_: float = 1.0,
    others: str = "average",
) -> Combine:
    """`θ_0 + λ M` with `M = (Σ τ_t G_t)(Σ G_t + C)⁻¹`, and its strongest directions once more where tasks differ much.

    `G_t = S_t + ε I`, `S_t` the Gram matrix of the rows of τ_t around their mean; every row of C is the mean row of
    `Σ S_t`. Where the logarithms of `‖τ_t‖²` vary by more than `heterogeneity` (variance over squared mean) tasks are
    unlike: S_t and ε are divided by the trace of S_t, C by the mean of `‖τ_t‖²`, and to M is added
    `σ̄ U_k V_kᵀ` of `M + Σ τ_t (S_t - mean G)`, σ̄ the mean of its first k singular values.

    Args:
        view: Of the models.
        solver: "closed", or "iterative": Adam on `Σ tr (M - τ_t) G_t (M - τ_t)ᵀ` from the mean. That has no C, which
            belongs to no objective.
        epsilon: ε; absolute, so that results depend on the length of the task vectors.
        heterogeneity: From where on tasks are unlike.
        refined_share: k is this part of min(m, n), rounded down.
        centre_updates: Whether τ_t loses its mean row in `Σ τ_t G_t` too, as in the release.
        num_steps: Of Adam.
        learning_rate: Of Adam.
        lambda_: Scale.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Xu et al. 2026, arXiv:2603.02945; the released code for what they leave open.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    constants = {
        "input_axis": view.input_axis,
        "solver": solver,
        "num_steps": num_steps,
        "kept": int(refined_share * min(view.shape) + 1e-9),
        "centre_updates": centre_updates,
    }
    return Combine(_merge_ace, (epsilon, heterogeneity, learning_rate, lambda_), tuple(constants.items()))


def divide_matrix(xp: Any, above: Leaf, below: Leaf) -> Leaf:
    """`A B⁻¹`."""
    return xp.linalg.solve(below.T, above.T).T


def descend(xp: Any, start: Leaf, target: Leaf, gram: Leaf, num_steps: int, learning_rate: Any) -> Leaf:
    """Adam on a quadratic whose gradient is `2 (M G - target)`: β 0.9 and 0.999, ε 1e-8, as torch has them.

    Shapes:
        start, target, result: float[m, n].
        gram: float[n, n], symmetric.
    """

    def step(number, state):
        merged, mean, square = state
        gradient = 2 * (multiply(xp, merged, gram) - target)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient * gradient
        unbiased, scale = mean / (1 - 0.9 ** (number + 1)), xp.sqrt(square / (1 - 0.999 ** (number + 1)))
        return merged - learning_rate * unbiased / (scale + 1e-8), mean, square

    state = start, xp.zeros_like(start), xp.zeros_like(start)
    if xp is np:
        for number in range(num_steps):
            state = step(number, state)
        return state[0]
    import jax

    return jax.lax.fori_loop(0, num_steps, lambda n, state: step(n.astype(start.dtype), state), state)[0]


def _merge_wudi(
    elements: Elements,
    ridge: float,
    learning_rate: float,
    scale: float,
    input_axis: int,
    solver: str,
    num_steps: int,
    equal_norms: bool,
) -> Leaf:
    xp, factors = elements.xp, [1.0] * len(elements.models)
    if equal_norms:
        norms = [xp.sqrt(xp.sum(matrix * matrix)) for matrix in each_matrix(elements, input_axis)]
        factors = [sum(norms) / len(norms) / xp.where(norm > 0, norm, 1.0) for norm in norms]
    start = target = gram = 0.0
    for matrix, factor in zip(each_matrix(elements, input_axis), factors, strict=True):
        matrix = matrix * factor
        square = xp.sum(matrix * matrix)
        one = multiply(xp, matrix.T, matrix) / xp.where(square > 0, square, 1.0)
        start, target, gram = start + matrix, target + multiply(xp, matrix, one), gram + one
    if solver == "iterative":
        merged = descend(xp, start, target, gram, num_steps, learning_rate)
    else:
        mean = xp.trace(gram) / len(gram)
        pull = xp.where(mean > 0, mean, 1.0) * ridge
        merged = divide_matrix(xp, target + pull * start, gram + pull * xp.eye(len(gram), dtype=gram.dtype))
    return add_matrix(elements, merged, scale, input_axis)


def _merge_ace(
    elements: Elements,
    epsilon: float,
    heterogeneity: float,
    learning_rate: float,
    scale: float,
    input_axis: int,
    solver: str,
    num_steps: int,
    kept: int,
    centre_updates: bool,
) -> Leaf:
    xp, count = elements.xp, len(elements.models)
    lengths = xp.stack([xp.sum(matrix * matrix) for matrix in each_matrix(elements, input_axis)])
    is_unlike = _varies(xp, xp.log(lengths + 1e-12), heterogeneity)
    target = grams = gram = 0.0
    spreads = []
    for matrix in each_matrix(elements, input_axis):
        centred = matrix - xp.mean(matrix, axis=0, keepdims=True)
        spread = multiply(xp, centred.T, centred)
        divisor = xp.where(is_unlike, xp.trace(spread) + 1e-12, 1.0)
        spread, ridge = spread / divisor, epsilon / divisor
        one = spread + ridge * xp.eye(len(spread), dtype=spread.dtype)
        target = target + multiply(xp, centred if centre_updates else matrix, one)
        grams, gram = grams + spread, gram + one
        spreads.append(spread)
    if solver == "iterative":
        start = sum_matrices(elements, input_axis) / count
        merged = descend(xp, start, target, gram, num_steps, learning_rate)
        return add_matrix(elements, merged, scale, input_axis)
    common = xp.mean(grams, axis=0, keepdims=True) / xp.where(is_unlike, xp.mean(lengths) + 1e-12, 1.0)
    merged = divide_matrix(xp, target, gram + common)
    if kept and not (xp is np and not is_unlike):
        rest = merged
        for matrix, spread in zip(each_matrix(elements, input_axis), spreads, strict=True):
            rest = rest + multiply(xp, matrix, spread - gram / count)
        left, values, right = top_factors(xp, rest, kept)
        more = multiply(xp, left, right.T) * xp.mean(values)
        merged = merged + xp.where(is_unlike, more, xp.zeros((), more.dtype))
    return add_matrix(elements, merged, scale, input_axis)


def _varies(xp, logs, most):
    """Whether variance over squared mean exceeds a bound; of one task it never does."""
    if logs.shape[0] < 2:
        return xp.asarray(False)
    mean = xp.mean(logs)
    return xp.sum((logs - mean) ** 2) / (logs.shape[0] - 1) > most * (mean * mean + 1e-12)


def _check(options):
    check_others(options)
    check_choice(options, "solver", ("closed", "iterative"))
    check_between(options, "num_steps", 0, float("inf"))
    check_between(options, "learning_rate", 0, float("inf"))
    for option in ("ridge", "epsilon", "heterogeneity"):
        if option in options:
            check_between(options, option, 0, float("inf"))
    if "refined_share" in options:
        check_between(options, "refined_share", 0, 1)


WUDI = Method(
    merge_wudi,
    "least squares with covariances of the task vectors",
    "arXiv:2503.08099",
    unit="leaf",
    presets={"fusionbench": {"solver": "iterative", "num_steps": 400}},
    check=_check,
)
ACE = Method(
    merge_ace,
    "least squares with adaptive covariances of the task vectors",
    "arXiv:2603.02945",
    unit="leaf",
    presets={"release": {"centre_updates": True}},
    check=_check,
)
