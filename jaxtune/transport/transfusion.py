"""TransFusion: heads by singular values, one order of the stream per junction."""

from jaxtune.align.transfusion import match_transfusion
from jaxtune.symmetry import element as elements
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.tree import check_same, task_vector
from jaxtune.types import Params


def prepare_transfusion(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    junctions: str = "each",
    inside: str = "joint",
    order: str = "random",
    max_sweeps: int = 100,
    include_output_spectrum: bool = True,
    repair_stop: bool = True,
    repair_phase: bool = True,
    repair_backward: bool = True,
    repair_tolerance: bool = True,
    repair_start: bool = True,
) -> Prepared:
    """Matches the old base to the new one as TransFusion does and moves the task vector along.

    With the defaults, the paper's method with the faults of its released code repaired. All five
    `repair_*` False reproduce the released code; `junctions="shared", inside="separate"` turn it into
    an exact symmetry of the stock network, which the paper's element is not: its junctions disagree,
    and the target keeps plain skips. `coherence` in the evidence says by how much.

    Args:
        key: Draws the order of the groups, anew in every sweep.
        symmetry: Spec of the bases; must know `junctions` and `inside` (the transformers do).
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.
        junctions: "each": one order of the stream per junction. "shared": one for all.
        inside: "joint": one order for the units of a head. "separate": one for QK and one for VO.
        order, max_sweeps, include_output_spectrum, repair_stop, repair_phase, repair_backward,
            repair_tolerance, repair_start: As in `align.transfusion.match_transfusion`.

    Raises:
        ConfigError: the family has no such spec (a network without attention).
        TreeMismatchError, SpecError, NonFiniteError, UnknownNameError: as `match_transfusion`.

    Reference:
        Rinaldi et al. 2025, arXiv:2505.22697; steps 1 to 13 of its released code.
    """
    spec = symmetry(junctions=junctions, inside=inside)
    check_same({"source": source, "finetuned": finetuned, "target": target})
    result = match_transfusion(
        key,
        spec,
        target,
        source,
        order=order,
        max_sweeps=max_sweeps,
        include_output_spectrum=include_output_spectrum,
        repair_stop=repair_stop,
        repair_phase=repair_phase,
        repair_backward=repair_backward,
        repair_tolerance=repair_tolerance,
        repair_start=repair_start,
    )

    def move(finetuned):
        return elements.apply(spec, result.element, task_vector(source, finetuned))

    return Prepared(
        task_vector=move(finetuned),
        spec=spec,
        element=result.element,
        info={
            "is_converged": result.is_converged,
            "num_sweeps": result.num_sweeps,
            "reached_inside": result.reached_inside,
        },
        move=move,
    )
