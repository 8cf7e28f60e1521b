"""Chooses a transport from the weights alone: plain addition among kin, the best-matching element otherwise."""

import dataclasses

from jaxtune.align.evidence import judge_match, measure_residual
from jaxtune.errors import SpecError
from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.transport.full import prepare_full
from jaxtune.transport.identity import prepare_identity
from jaxtune.transport.permutation import prepare_permutation
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.types import Params


def prepare_auto(key, symmetry: Symmetry, source: Params, finetuned: Params, target: Params) -> Prepared:
    """Plain addition where the bases are kin as they lie, else permutation or the full group by their match.

    Where two bases descend from one start, plain addition carries about 95 % of a fine-tune and moving
    anything can only lose; so kinship is looked for first. Otherwise the weights are aligned by permutations
    and, where the family's norms can be folded, by the full group, and the one that leaves the smaller residual
    moves the task vector. Both residuals are taken on folded weights, so that they compare like with like.

    Args:
        key: Draws the random elements that kinship is judged against.
        symmetry: Spec of the bases.
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.

    Raises:
        TreeMismatchError, SpecError, NonFiniteError: as `prepare_permutation`.
    """
    permuted = prepare_permutation(named_key(key, "permutation"), symmetry, source, finetuned, target)
    evidence = judge_match(named_key(key, "evidence"), permuted.spec, target, source, permuted.element)
    lineage, residuals, refused = evidence.lineage, {}, None
    if lineage.verdict != "unrelated" and lineage.is_in_place:
        chosen, name = prepare_identity(key, symmetry, source, finetuned, target), "identity"
    elif permuted.spec.form is None or lineage.verdict == "same":
        chosen, name = permuted, "permutation"
    else:
        chosen, name = permuted, "permutation"
        try:
            full = prepare_full(named_key(key, "full"), symmetry, source, finetuned, target)
        except SpecError as error:  # weights that cannot be folded, as behind a gain of exactly zero
            refused = str(error)
        else:
            ours, theirs = full.fold(target), full.fold(source)
            judged = judge_match(named_key(key, "full evidence"), full.spec, ours, theirs, full.element)
            moved = full.fold(elements.apply(permuted.spec, permuted.element, source))
            residuals = {"permutation": measure_residual(full.spec, ours, moved), "full": judged.residual["found"]}
            if residuals["full"] < residuals["permutation"]:
                chosen, name = full, "full"
            if judged.lineage.verdict != "unrelated":
                lineage = judged.lineage
    info = {"chosen": name, "because": dataclasses.asdict(lineage), "residuals": residuals, "full_refused": refused}
    return dataclasses.replace(chosen, info={**chosen.info, **info})
