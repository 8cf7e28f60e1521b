"""Chooses a transport from the weights alone: plain addition among kin, a permutation otherwise."""

import dataclasses

from jaxtune.align.evidence import judge_match
from jaxtune.rng import named_key
from jaxtune.transport.identity import prepare_identity
from jaxtune.transport.permutation import prepare_permutation
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.types import Params


def prepare_auto(key, symmetry: Symmetry, source: Params, finetuned: Params, target: Params) -> Prepared:
    """Plain addition where the bases are kin as they lie, else the best permutation.

    Where two bases descend from one start, plain addition carries about 95 % of a fine-tune and moving
    anything can only lose; so kinship is looked for first, and the aligned vector is used where kinship
    shows after alignment only (a reordered copy) or not at all.

    Args:
        key: Draws the random elements that kinship is judged against.
        symmetry: Spec of the bases.
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.

    Raises:
        TreeMismatchError, SpecError, NonFiniteError: as `prepare_permutation`.
    """
    moved = prepare_permutation(named_key(key, "permutation"), symmetry, source, finetuned, target)
    evidence = judge_match(named_key(key, "evidence"), moved.spec, target, source, moved.element)
    lineage = evidence.lineage
    chosen, name = moved, "permutation"
    if lineage.verdict != "unrelated" and lineage.is_in_place:
        chosen, name = prepare_identity(key, symmetry, source, finetuned, target), "identity"
    return dataclasses.replace(chosen, info={**chosen.info, "chosen": name, "because": dataclasses.asdict(lineage)})
