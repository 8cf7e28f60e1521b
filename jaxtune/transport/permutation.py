"""Git Re-Basin for task vectors, with heads kept whole: one exact element for the whole network."""

from jaxtune.align.weights import match_weights
from jaxtune.symmetry import element as elements
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.transport.trust import check_trust, weigh_by_trust
from jaxtune.tree import check_same, task_vector
from jaxtune.types import Params


def prepare_permutation(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    junctions: str = "shared",
    scales: str = "fixed",
    head_cost: str = "exact",
    num_restarts: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-6,
    trust: float = 0.0,
) -> Prepared:
    """Matches the old base to the new one by permutations and moves the task vector along.

    With one order for the whole residual stream the element is an exact symmetry: the moved old base computes
    what the old base did.

    Args:
        key: Orders the groups in restarts.
        symmetry: Spec of the bases.
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.
        junctions: "shared": one order of the stream. "each": one per junction, as in TransFusion; not exact.
        scales: "fixed": orders, and signs behind odd activations. "free": positive scales of ReLU units too, for
            families that declare them (perceptrons, ResNets).
        head_cost, num_restarts, max_sweeps, tolerance: As in `align.weights.match_weights`.
        trust: Power of each block's cosine that the moved update is multiplied by, see `transport.trust`; 0: none.

    Raises:
        TreeMismatchError, SpecError, NonFiniteError, UnknownNameError: as `match_weights`.
        ConfigError: as `match_weights`; the family has no such `junctions` or `scales`; `trust` is negative or not
            finite.

    Reference:
        Ainsworth et al. 2023, arXiv:2209.04836. Differs: attention heads move as units with the units
        inside them, QK and VO apart.
    """
    check_trust(trust)
    asked = {"junctions": junctions} if junctions != "shared" else {}
    asked |= {"scales": scales} if scales != "fixed" else {}  # what every family has anyway is not asked of it
    spec = symmetry(**asked)
    check_same({"source": source, "finetuned": finetuned, "target": target})
    result = match_weights(
        key,
        spec,
        target,
        source,
        head_cost=head_cost,
        num_restarts=num_restarts,
        max_sweeps=max_sweeps,
        tolerance=tolerance,
    )

    def move(finetuned):
        change = elements.apply(spec, result.element, task_vector(source, finetuned))
        return weigh_by_trust(spec, result.element, change, target, source, trust=trust)

    moved, factors = move(finetuned)
    return Prepared(
        task_vector=moved,
        spec=spec,
        element=result.element,
        info={
            "is_converged": result.is_converged,
            "num_sweeps": result.num_sweeps,
            "start": result.start,
            "objectives": list(result.objectives),
            "trust": factors,
        },
        move=lambda finetuned: move(finetuned)[0],
    )
