"""Keeps of a task vector what the new base's own gradients point at: signs of single examples vote on every entry.

A direction survives the way from one base to another, a size does not. So the task vector, moved or as it is, loses
every entry along which the examples say that the loss would rise.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.gradients import (
    ExampleGradients,
    LabelLoss,
    SummedGradient,
    TeacherLoss,
    check_sample,
    fold_chunks,
    sum_signs,
    with_teacher,
)
from jaxtune.sample import Sample
from jaxtune.transport.auto import prepare_auto
from jaxtune.transport.directions import split_directions, sum_direction_signs
from jaxtune.transport.full import prepare_full
from jaxtune.transport.identity import prepare_identity
from jaxtune.transport.permutation import prepare_permutation
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.transport.transfusion import prepare_transfusion
from jaxtune.tree import check_finite, flatten, is_float, unflatten
from jaxtune.types import Params

# What moves the task vector before it is masked; each needs the weights alone.
ALIGN = {
    "none": prepare_identity,
    "permutation": prepare_permutation,
    "full": prepare_full,
    "transfusion": prepare_transfusion,
    "auto": prepare_auto,
}
VOTES = ("majority", "mean")
MASKS = ("keep", "force", "soft")
OVER = ("entry", "direction")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How votes become a mask.

    Attributes:
        vote: "majority": every example's sign has one voice. "mean": the sign of the summed gradient.
        mask: "keep": an entry stays where its sign is the vote's. "force": its size stays and its sign becomes the
            vote's. "soft": it is multiplied by `sigmoid(sharpness * s * sign(entry))`, s the mean of the signs.
        over: "entry", or "direction": one vote for every singular direction of a matrix of the task vector, of which
            there are far fewer.
        z: A majority counts as far as it is above chance: `|s|` is lowered by `z / sqrt(N)`. 0: any majority counts.
        sharpness: Of "soft".

    Where the vote is a tie, or nothing, an entry becomes 0 under every rule.
    """

    vote: str = "majority"
    mask: str = "keep"
    over: str = "entry"
    z: float = 0.0
    sharpness: float = 5.0

    def __post_init__(self):
        for name, value, known in (("vote", self.vote, VOTES), ("mask", self.mask, MASKS), ("over", self.over, OVER)):
            if value not in known:
                raise unknown_name(name, value, known)
        if not (np.isfinite(self.z) and self.z >= 0) or not self.sharpness > 0:
            raise ConfigError(f"z is {self.z} and sharpness {self.sharpness}; z is at least 0, sharpness above it.")
        if self.z and self.vote == "mean":
            raise ConfigError("z lowers the share of a majority; a mean vote has none. Take vote='majority'.")

    def weigh(self, entries: np.ndarray, votes: np.ndarray, num_examples: int) -> np.ndarray:
        """Masked entries.

        Shapes:
            entries, votes: [...]; votes int32 sums of signs of descent, or minus the summed gradient.
        """
        share = np.sign(votes) if self.vote == "mean" else votes / num_examples
        share = np.sign(share) * np.maximum(0.0, np.abs(share) - self.z / np.sqrt(num_examples))
        share = share.astype(entries.dtype)
        if self.mask == "force":
            return np.abs(entries) * np.sign(share)
        agreement = share * np.sign(entries)
        if self.mask == "keep":
            return np.where(agreement > 0, entries, 0)
        weight = 1 / (1 + np.exp(-np.asarray(self.sharpness, entries.dtype) * agreement))
        return np.where(agreement == 0, 0, weight * entries)


def prepare_gradfix(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    sample: Sample,
    align: str = "none",
    vote: str = "majority",
    mask: str = "keep",
    over: str = "entry",
    z: float = 0.0,
    sharpness: float = 5.0,
    chunk_size: int = 8,
) -> Prepared:
    """Masks the task vector by the signs of the new base's gradients on labelled examples.

    With the mean vote over the entries every kept entry has a product of at most 0 with the gradient of the examples'
    loss, so that a small enough scale descends.

    Args:
        key: Of the alignment.
        symmetry: Spec of the bases.
        source, finetuned, target: Old base, its fine-tune, new base.
        sample: Labelled examples of the fine-tune's task. The target sees them in evaluation mode, and is not trained.
        align: What moves the task vector first, a key of `ALIGN`.
        vote, mask, over, z, sharpness: See `Rule`.
        chunk_size: Examples whose gradients are there at one time; see `gradients`.

    Returns:
        The alignment's own, its task vector masked; `info["kept"]` is the share of entries, or directions, that are not
        zero and stay so, `info["agreement"]` the mean of `|s|`. Votes belong to one task, so `move` is None.

    Raises:
        UnknownNameError: no such align, vote, mask or over.
        ConfigError: a number out of range.
        DataError: no examples, no labels, a label that is no class, or NaN.
        JaxtuneError: as the alignment.

    Reference:
        Rinaldi et al. 2026, arXiv:2510.09658: majority and mean votes, "keep" and "force". Differs: leaves that the
        loss does not reach become 0 and are not carried whole. Singular directions, `z` and the use behind an alignment
        are this project's.
    """
    rule = Rule(vote, mask, over, z, sharpness)
    check_sample(sample, target, is_labelled=True)
    prepared = _align(align, key, symmetry, source, finetuned, target)
    return mask_prepared(prepared, symmetry, target, sample, LabelLoss(sample.forward), rule, chunk_size=chunk_size)


def prepare_gradfix_teacher(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    sample: Sample,
    align: str = "none",
    vote: str = "majority",
    mask: str = "keep",
    over: str = "entry",
    z: float = 0.0,
    sharpness: float = 5.0,
    temperature: float = 1.0,
    chunk_size: int = 8,
) -> Prepared:
    """`prepare_gradfix` without labels: the fine-tuned source is at hand and says what it thinks of each input.

    Args:
        key, symmetry, source, finetuned, target, align, vote, mask, over, z, sharpness, chunk_size: As
            `prepare_gradfix`.
        sample: Inputs of the fine-tune's task; labels are not read.
        temperature: Of both predictions in `KL(finetuned ‖ target)`, whose gradient at the target votes.

    Raises:
        JaxtuneError: as `prepare_gradfix`.

    Reference:
        This project.
    """
    rule = Rule(vote, mask, over, z, sharpness)
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be positive.")
    check_sample(sample, target, is_labelled=False)
    prepared = _align(align, key, symmetry, source, finetuned, target)
    taught = with_teacher(sample.without_labels(), finetuned)
    loss = TeacherLoss(sample.forward, temperature)
    return mask_prepared(prepared, symmetry, target, taught, loss, rule, chunk_size=chunk_size)


def prepare_align_then_mask(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    sample: Sample,
    align: str = "full",
    vote: str = "majority",
    mask: str = "keep",
    over: str = "entry",
    z: float = 0.0,
    sharpness: float = 5.0,
    chunk_size: int = 8,
) -> Prepared:
    """Moves the task vector by an alignment of the weights, then masks it: by labels where there are, else by the
    fine-tuned source's word.

    Args, Returns, Raises:
        As `prepare_gradfix`.

    Reference:
        This project.
    """
    prepare = prepare_gradfix if sample.is_labelled else prepare_gradfix_teacher
    return prepare(
        key, symmetry, source, finetuned, target, sample=sample, align=align, vote=vote, mask=mask, over=over, z=z,
        sharpness=sharpness, chunk_size=chunk_size,
    )  # fmt: skip


def mask_prepared(
    prepared: Prepared,
    symmetry: Symmetry,
    target: Params,
    sample: Sample,
    loss: Any,
    rule: Rule,
    *,
    chunk_size: int = 8,
) -> Prepared:
    """A prepared transport whose task vector goes through a mask.

    Args:
        prepared: Of any method.
        symmetry: Spec of the bases.
        target: The new base, at which gradients are taken.
        sample: What `loss` reads: examples with labels, or with what a teacher says (`gradients.with_teacher`).
        loss: Of every example, see `gradients.Loss`.
        rule: From votes to a mask.
        chunk_size: Examples at a time.
    """
    vector = {path: np.asarray(leaf) for path, leaf in flatten(prepared.task_vector).items()}
    check_finite("the target", target)
    basis = split_directions(symmetry(), vector) if rule.over == "direction" else {}
    votes = cast_votes(target, sample, loss, vote=rule.vote, basis=basis, chunk_size=chunk_size)
    masked, agreement, num_moved, num_kept = {}, [], 0, 0
    for path, leaf in vector.items():
        if not is_float(leaf):
            masked[path] = leaf
            continue
        entries = basis[path].values if path in basis else leaf
        weighed = rule.weigh(entries, votes[path], len(sample))
        masked[path] = basis[path].join(weighed, leaf) if path in basis else weighed
        num_moved, num_kept = num_moved + np.count_nonzero(entries), num_kept + np.count_nonzero(weighed)
        agreement.append(np.abs(votes[path]).ravel() / len(sample))
    info = {"num_examples": len(sample), "kept": num_kept / max(num_moved, 1)}
    if rule.vote == "majority":
        info["agreement"] = float(np.mean(np.concatenate(agreement)))
    return dataclasses.replace(prepared, task_vector=unflatten(masked), info={**prepared.info, **info}, move=None)


def cast_votes(
    params: Params,
    sample: Sample,
    loss: Any,
    *,
    vote: str = "majority",
    basis: Mapping[str, Any] | None = None,
    chunk_size: int = 8,
) -> dict[str, np.ndarray]:
    """Votes of the examples for the direction of descent, leaf by leaf.

    Args:
        params: Where gradients are taken.
        sample: Examples.
        loss: Of every example.
        vote: "majority": sums of the signs of single examples. "mean": minus the summed gradient.
        basis: Leaves that are voted on by direction, as `split_directions` gives them.
        chunk_size: Examples at a time.

    Shapes:
        result[path]: int32 ("majority") or float32 in the shape of the leaf; of leaves in `basis`, [directions].
    """
    basis = basis or {}
    if vote == "majority":
        fold = sum_direction_signs if basis else sum_signs
        aux = {path: (one.left, one.right) for path, one in basis.items()}
        found = fold_chunks(ExampleGradients(loss, fold), params, sample, chunk_size=chunk_size, aux=aux)
        return {path: np.asarray(leaf) for path, leaf in found.items()}
    summed = fold_chunks(SummedGradient(loss), params, sample, chunk_size=chunk_size)
    return {
        path: basis[path].project(-np.asarray(leaf)) if path in basis else -np.asarray(leaf)
        for path, leaf in summed.items()
    }


def _align(align, key, symmetry, source, finetuned, target):
    if align not in ALIGN:
        raise unknown_name("align", align, ALIGN)
    return ALIGN[align](key, symmetry, source, finetuned, target)
