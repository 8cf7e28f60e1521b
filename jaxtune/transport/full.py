"""The whole symmetry group: rotations of the stream, invertible maps inside heads, orders of heads and units."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtune.align.weights import match_weights
from jaxtune.symmetry import canonical
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.element import Element
from jaxtune.symmetry.spec import Spec
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.transport.trust import check_trust, weigh_by_trust
from jaxtune.tree import check_finite, check_same, map_leaves, task_vector
from jaxtune.types import Params


def prepare_full(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    head_cost: str = "circuit",
    weighting: str = "plain",
    num_restarts: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-3,
    trust: float = 0.0,
) -> Prepared:
    """Matches folded weights by the whole group and moves what fine-tuning did to them.

    All three networks are folded (`symmetry.canonical`): there the stream may turn by any rotation that keeps
    the ones vector and every head by any invertible map, and `g(finetuned) - g(source)` is the moved update.
    It is written back into the target's own form, gains as they are. Lazy networks (`jaxtune.lazy`) are folded, matched
    and written leaf by leaf.

    Args:
        key: Orders the groups in restarts.
        symmetry: Spec of the bases; must declare a form (the transformers do).
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.
        head_cost, weighting, num_restarts, max_sweeps: As in `align.weights.match_weights`.
        tolerance: The same. Rotations creep between unrelated networks: two ViT-B/16 take 12 sweeps at 1e-3
            (benchmarks/align.py); narrow bases of the ladder take 6 or 7, and at 1e-6 30 or 45, for 0.3 % of the
            objective and less than a point of the recovered share. A planted element is found in two sweeps.
        trust: Power of each block's cosine that the moved update is multiplied by, see `transport.trust`; 0: none.

    Returns:
        `spec` and `element` are those of the folded weights; `info["lost"]` says what the target's own form
        could not hold, leaf by leaf, `info["trust"]` the factor of every block.

    Raises:
        SpecError: the family declares no form.
        ConfigError: as `match_weights`; `trust` is negative or not finite.
        TreeMismatchError, NonFiniteError, UnknownNameError: as `match_weights`.

    Reference:
        Theus et al. 2025, arXiv:2506.22712 (rotations of the stream); the in-head maps and the transport of a
        task vector through both are this project's.
    """
    check_trust(trust)
    spec = symmetry()
    check_same({"source": source, "finetuned": finetuned, "target": target})
    for name, params in (("source", source), ("finetuned", finetuned), ("target", target)):
        check_finite(name, params)
    folded_spec = canonical.canonical_spec(spec)
    folded = {name: canonical.fold(spec, params) for name, params in (("source", source), ("target", target))}
    result = match_weights(
        key,
        folded_spec,
        folded["target"],
        folded["source"],
        head_cost=head_cost,
        weighting=weighting,
        num_restarts=num_restarts,
        max_sweeps=max_sweeps,
        tolerance=tolerance,
    )
    found = {
        "is_converged": result.is_converged,
        "num_sweeps": result.num_sweeps,
        "start": result.start,
        "objectives": list(result.objectives),
    }
    return carry_by_element(spec, result.element, folded, finetuned, target, trust=trust, info=found)


def carry_by_element(
    spec: Spec,
    element: Element,
    folded: Mapping[str, Params],
    finetuned: Params,
    target: Params,
    *,
    trust: float,
    info: Mapping[str, Any],
    turn: Callable[[Params], Params] = lambda change: change,
) -> Prepared:
    """Moves what fine-tuning did to folded weights by an element of theirs, and writes it into the target's form.

    Args:
        spec: Symmetry of the networks, not of their folded weights.
        element: Of the folded weights.
        folded: "source" and "target", folded.
        finetuned, target, trust: As `prepare_full`.
        info: What is known of the element; "lost" and "trust" are added.
        turn: What happens to the moved change of the folded weights before it is written.
    """
    folded_spec = canonical.canonical_spec(spec)

    def move(finetuned):
        change = task_vector(folded["source"], canonical.fold(spec, finetuned))
        change = turn(elements.apply(folded_spec, element, change))
        change, factors = weigh_by_trust(folded_spec, element, change, folded["target"], folded["source"], trust=trust)
        moved = canonical.unfold(spec, change, target)
        narrow = map_leaves(
            lambda _, leaf: leaf.astype(_narrow(leaf), copy=False),
            moved.task_vector,
            dtype=lambda _, leaf: _narrow(leaf),
        )
        return narrow, moved.lost, factors

    moved, lost, factors = move(finetuned)
    return Prepared(
        task_vector=moved,
        spec=folded_spec,
        element=element,
        fold=functools.partial(canonical.fold, spec),
        # A folded entry norm is a matrix and a tied table two leaves, for which a network of the family has no place.
        realise=functools.partial(canonical.realise, spec) if canonical.can_realise(spec.form) else None,
        info={**info, "lost": lost, "trust": factors},
        move=lambda finetuned: move(finetuned)[0],
    )


def _narrow(leaf):
    """Folding is done in float64; a task vector is float32."""
    return np.float32 if leaf.dtype == np.float64 else leaf.dtype
