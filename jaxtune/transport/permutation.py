"""Git Re-Basin for task vectors, with heads kept whole: one exact element for the whole network."""

from jaxtune.align.weights import match_weights
from jaxtune.symmetry import element as elements
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.tree import task_vector
from jaxtune.types import Params


def prepare_permutation(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    junctions: str = "shared",
    head_cost: str = "exact",
    num_restarts: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-6,
) -> Prepared:
    """Matches the old base to the new one by permutations and moves the task vector along.

    With one order for the whole residual stream the element is an exact symmetry: the moved old base computes
    what the old base did.

    Args:
        key: Orders the groups in restarts.
        symmetry: Spec of the bases.
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.
        junctions: "shared": one order of the stream. "each": one per junction, as in TransFusion; not exact.
        head_cost, num_restarts, max_sweeps, tolerance: As in `align.weights.match_weights`.

    Raises:
        TreeMismatchError, SpecError, NonFiniteError, UnknownNameError: as `match_weights`.

    Reference:
        Ainsworth et al. 2023, arXiv:2209.04836. Differs: attention heads move as units with the units
        inside them, QK and VO apart.
    """
    spec = symmetry() if junctions == "shared" else symmetry(junctions=junctions)
    vector = task_vector(source, finetuned)
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
    return Prepared(
        task_vector=elements.apply(spec, result.element, vector),
        spec=spec,
        element=result.element,
        info={
            "is_converged": result.is_converged,
            "num_sweeps": result.num_sweeps,
            "start": result.start,
            "objectives": list(result.objectives),
        },
    )
