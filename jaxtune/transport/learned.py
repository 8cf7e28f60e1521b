"""The element learned from unlabelled inputs, so that the new base with the moved update predicts as the fine-tune."""

import functools

import numpy as np

from jaxtune.align.learned import start_element
from jaxtune.align.learning import Training, learn_element
from jaxtune.sample import Sample
from jaxtune.symmetry import canonical
from jaxtune.symmetry import element as elements
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.tree import check_finite, check_same, map_leaves, task_vector
from jaxtune.types import Params


def prepare_learned(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    sample: Sample,
    objective: str = "transport",
    orders: str = "held",
    scale: float = 1.0,
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
) -> Prepared:
    """Moves the task vector by an element that is learned from matching's start, an exact symmetry all the same.

    On folded weights where the family has a place for them, else by what the family declares (orders alone then; pass
    `orders="sinkhorn"`). Only the element learns: the update stays the fine-tune's own, turned.

    Args:
        key: Draws batches.
        symmetry: Spec of the bases.
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.
        sample: Inputs of the task; labels are not looked at.
        objective: "transport": `KL(fine-tune || target + scale * moved update)`. "interpolation": the bases alone, as
            align method `learned` does; the fine-tune is not looked at.
        scale: Of the moved update while it learns.
        orders, num_steps, batch_size, learning_rate, order_rate, residual_weight, validation_share, evaluate_every,
            patience, mixes, start: As in `align.learned.match_learned`.

    Returns:
        `info["losses"]` says what the held-out inputs said after how many steps, `info["lost"]` what the target's own
        form could not hold.

    Raises:
        DataError, SpecError, ConfigError, TreeMismatchError, NonFiniteError, UnknownNameError: as `match_learned`.

    Reference:
        Theus et al. 2025, arXiv:2506.22712 (learning the element); the objective is this project's.
    """
    spec = symmetry()
    check_same({"source": source, "finetuned": finetuned, "target": target})
    for name, params in (("source", source), ("finetuned", finetuned), ("target", target)):
        check_finite(name, params)
    is_folded = spec.form is not None and canonical.can_realise(spec.form)
    own = canonical.canonical_spec(spec) if is_folded else spec
    fold = functools.partial(canonical.fold, spec) if is_folded else _as_it_is
    old, new, tuned = fold(source), fold(target), fold(finetuned)
    found = learn_element(
        key,
        own,
        new,
        old,
        sample=sample,
        start=start_element(key, own, new, old, sample=sample, start=start),
        orders=orders,
        objective=objective,
        finetuned=tuned if objective == "transport" else None,
        scale=scale,
        training=Training(
            num_steps=num_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            order_rate=order_rate,
            residual_weight=residual_weight,
            validation_share=validation_share,
            evaluate_every=evaluate_every,
            patience=patience,
            mixes=mixes,
        ),
    )

    def move(finetuned):
        change = elements.apply(own, found.element, task_vector(old, fold(finetuned)))
        if not is_folded:
            return change, {}
        moved = canonical.unfold(spec, change, target)
        return map_leaves(lambda _, leaf: leaf.astype(_narrow(leaf), copy=False), moved.task_vector), moved.lost

    moved, lost = move(finetuned)
    return Prepared(
        task_vector=moved,
        spec=own,
        element=found.element,
        fold=fold,
        realise=functools.partial(canonical.realise, spec) if is_folded else _as_it_is,
        info={
            "is_converged": found.is_converged,
            "num_steps": found.num_steps,
            "losses": [list(entry) for entry in found.losses],
            "num_held": found.num_held,
            "lost": lost,
        },
        move=lambda finetuned: move(finetuned)[0],
    )


def _as_it_is(params, like=None):
    del like
    return params


def _narrow(leaf):
    """Folding is done in float64; a task vector is float32."""
    return np.float32 if leaf.dtype == np.float64 else leaf.dtype
