"""Learned alignment: the element under which the networks between two bases predict what the bases do.

Starts from matching and moves on by gradient, on inputs without labels. What comes out is a hard element, so the moved
source computes exactly what the source did.
"""

from typing import Any

import jax

from jaxtune.align.activations import match_activations
from jaxtune.align.learning import LearnedResult, Training, learn_element
from jaxtune.align.weights import match_weights
from jaxtune.errors import unknown_name
from jaxtune.sample import Sample
from jaxtune.symmetry import canonical
from jaxtune.symmetry.spec import Spec
from jaxtune.types import Params

# What learning may start from -> weighting of the weight matching.
STARTS = {"weights": "plain", "agreement": "agreement", "activations": None}


def match_learned(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    sample: Sample,
    orders: str = "held",
    temperature: float = 1.0,
    num_steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    order_rate: float = 1e-2,
    residual_weight: float = 0.1,
    validation_share: float = 0.2,
    evaluate_every: int = 20,
    patience: int = 10,
    mixes: bool = True,
    start: str = "activations",
) -> LearnedResult:
    """Learns the element under which the line between moved source and target predicts as its ends do.

    Each step draws a batch and a place on the line and lowers `KL(mean prediction of both ends || prediction there)`
    plus `residual_weight` times the matching residual. Rotations, maps inside heads and rotary planes are free, and
    orders where `orders` says so, from where matching leaves them; a start at the identity does not get far.

    Args:
        key: Draws batches and places.
        spec: Symmetry of both networks, or of their folded weights.
        target, source: As `match_weights`.
        sample: Inputs; labels are not looked at.
        orders: "held", "straight_through" or "sinkhorn".
        temperature: Of Sinkhorn's iteration.
        num_steps, batch_size, learning_rate, order_rate, residual_weight, validation_share, evaluate_every, patience,
            mixes: See `Training`.
        start: What it starts from, a key of `STARTS`.

    Returns:
        The best element seen by the loss of the held-out inputs at the middle of the line, orders hard; the start
        where nothing was better.

    Raises:
        DataError: the sample is too small to hold some out, or holds NaN.
        SpecError: elements of the spec are not exact; the family has no place for folded weights.
        ConfigError: a number makes no sense.
        TreeMismatchError, NonFiniteError, UnknownNameError: as `match_weights`.

    Reference:
        Theus et al. 2025, arXiv:2506.22712 (learned matching, places from U(0.4, 0.6)). Differs: no labels; maps
        inside heads; the residual; inputs mixed with each other; starts from activations; stops by held-out inputs.

    Between two networks of other seeds the barrier of the line falls from 5.3 nats as they lie and 2.4 by `full` to
    0.18 with 512 unlabelled inputs (ViTs of width 64; docs/results.md, experiments.barrier); it did not come to zero.
    """
    training = Training(
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        order_rate=order_rate,
        residual_weight=residual_weight,
        validation_share=validation_share,
        evaluate_every=evaluate_every,
        patience=patience,
        mixes=mixes,
    )
    return learn_element(
        key,
        spec,
        target,
        source,
        sample=sample,
        start=start_element(key, spec, target, source, sample=sample, start=start),
        orders=orders,
        temperature=temperature,
        training=training,
    )


def match_straight_through(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    sample: Sample,
    num_steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    order_rate: float = 1e-2,
    residual_weight: float = 0.1,
    validation_share: float = 0.2,
    evaluate_every: int = 20,
    patience: int = 10,
) -> LearnedResult:
    """`match_learned` for orders: every step solves the assignments, and the gradient passes them straight through.

    Reference:
        Ainsworth et al. 2023, arXiv:2209.04836, section 3.3. Differs: what learns are the scores behind the orders, not
        a copy of the weights.
    """
    return match_learned(
        key,
        spec,
        target,
        source,
        sample=sample,
        orders="straight_through",
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        order_rate=order_rate,
        residual_weight=residual_weight,
        validation_share=validation_share,
        evaluate_every=evaluate_every,
        patience=patience,
    )


def match_sinkhorn(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    sample: Sample,
    temperature: float = 1.0,
    num_steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    order_rate: float = 5e-2,
    residual_weight: float = 0.1,
    validation_share: float = 0.2,
    evaluate_every: int = 20,
    patience: int = 10,
) -> LearnedResult:
    """`match_learned` for orders, which are doubly stochastic matrices on the way and hard at the end.

    Reference:
        Peña et al. 2023, arXiv:2212.12042 (Sinkhorn re-basin). Differs: the gradient goes through the iterations, which
        start near convergence, rather than through the implicit function; no labels.
    """
    return match_learned(
        key,
        spec,
        target,
        source,
        sample=sample,
        orders="sinkhorn",
        temperature=temperature,
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        order_rate=order_rate,
        residual_weight=residual_weight,
        validation_share=validation_share,
        evaluate_every=evaluate_every,
        patience=patience,
    )


def start_element(
    key: jax.Array, spec: Spec, target: Params, source: Params, *, sample: Sample, start: str
) -> dict[str, Any]:
    """What learning starts from: weight matching, as transport `full` calls it, or activation matching.

    Raises:
        UnknownNameError: no such start.
    """
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    if start == "activations":
        return match_activations(key, spec, target, source, sample=sample).element
    options = {"head_cost": "circuit", "tolerance": 1e-3} if canonical.is_folded(spec) else {}
    return match_weights(key, spec, target, source, weighting=STARTS[start], **options).element
