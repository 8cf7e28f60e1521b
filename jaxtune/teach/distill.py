"""Distillation: the fine-tuned old base is the teacher, the new base (or what a transport made of it) the student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.gradients import LabelLoss, Loss, TeacherLoss, check_sample, predict
from jaxtune.rng import named_key
from jaxtune.sample import Batch, Sample
from jaxtune.symmetry.spec import Spec
from jaxtune.teach.descent import Aim, Series, descend, round_to
from jaxtune.teach.judging import LEAVING, hold_out
from jaxtune.teach.weights import Learnable, block_scales, low_rank, turned_scales, whole_weights
from jaxtune.train.lora import DEFAULT_PATTERNS
from jaxtune.train.same_run import own_states
from jaxtune.tree import check_finite, check_same
from jaxtune.types import Params

LEARN = ("weights", "lora", "scales", "rotation")
TARGETS = ("soft", "hard", "labels")


@dataclass(frozen=True)
class Distilled:
    """A student.

    Attributes:
        params: Its tree, in the dtypes that it started with.
        info: What was chosen and seen on the way, see `descent.descend`; plain values.
    """

    params: Params
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KeepLoss:
    """What a support set is kept by: `KL(base ‖ network)`, and where it has labels half of it their cross-entropy."""

    forward: Callable[[Params, Batch], jax.Array]
    has_labels: bool = False

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        kept = TeacherLoss(self.forward)(params, batch)
        return (kept + LabelLoss(self.forward)(params, batch)) / 2 if self.has_labels else kept


@own_states()
def distill(
    sample: Sample,
    teacher: Params,
    start: Params,
    *,
    key: jax.Array | None = None,
    base: Params | None = None,
    learn: str = "weights",
    targets: str = "soft",
    temperature: float = 1.0,
    num_steps: int = 150,
    batch_size: int = 64,
    learning_rate: float | Sequence[float] | None = None,
    rate_factor: float = 1.0,
    held_out: float = 0.2,
    validation: Sample | None = None,
    margin: float = 0.0,
    errors: float = LEAVING,
    schedule_steps: int | None = None,
    support: Sample | None = None,
    support_validation: Sample | None = None,
    protect: float = 1.0,
    anchor: float = 0.0,
    weight_decay: float = 0.0,
    lora_rank: int = 8,
    lora_patterns: Sequence[str] = DEFAULT_PATTERNS,
    spec: Spec | None = None,
    teacher_forward: Callable[[Params, Batch], jax.Array] | None = None,
    series: Series | None = None,
) -> Distilled:
    """Trains a student to say on some inputs what the teacher says.

    A share of the inputs is held out where that leaves four or more: by them the learning rate and the number of steps
    are chosen, the start among the candidates. With fewer the middle one of the rates takes all the steps.

    Args:
        sample: Inputs of the task; labels are read by targets="labels" alone.
        teacher: The specialist, for instance the old base's fine-tune.
        start: What the student starts from: the new base, or a transport onto it.
        key: Of the order of the examples and of LoRA's first factors; None: key 0.
        base: The network that the support set is to be kept as by; None: `start`. Of a student that starts from a
            transport, the new base.
        learn: "weights": all of them. "lora": low-rank factors beside them. "scales": one factor for each block of what
            `start` has beyond `base`. "rotation": those, and a rotation of the residual stream of what it has; needs
            `spec`.
        targets: "soft": `T² KL(teacher ‖ student)`. "hard": the teacher's first class, or token. "labels": those of the
            sample, where a teacher with another vocabulary has spoken already.
        temperature: T.
        num_steps: With each learning rate.
        batch_size: Examples a step, at most all.
        learning_rate: One, several to choose from, or None: three that go by the size of the weights.
        rate_factor: Of those three; a rate that is given is taken as it is.
        held_out: Share of the sample, and of the support set, that the choice is made by.
        validation: Inputs to choose by instead of a share of the sample.
        margin: What leaving the start must bring at least on the held-out inputs, as the mean of `exp(-loss)`.
        errors: And by more than so many standard errors of that.
        schedule_steps: Steps of the schedule, where fewer of them are taken; None: `num_steps`.
        support: Inputs on which the student is to stay as `base` is; where it has labels, half of the penalty is the
            cross-entropy on them (replay).
        support_validation: Inputs to choose by instead of a share of the support set.
        protect: Factor of the support set's penalty.
        anchor: Factor of `||student - base||² / 2`, which protects where there is no support set.
        weight_decay: Decoupled.
        lora_rank, lora_patterns: Of "lora".
        spec: Symmetry of the student, for "rotation".
        teacher_forward: How the teacher is asked; None: as the student is.
        series: Where states are kept; a run that was killed goes on from there and gives the same bits.

    Returns:
        The student, and which learning rate and step it is of. The teacher's predictions of the whole sample are held
        in memory: N x C (x P) floats.

    Raises:
        UnknownNameError: no such `learn` or `targets`.
        ConfigError: a number out of range; "rotation" without `spec`.
        DataError: the sample or the support set is empty or holds NaN; labels that are no classes.
        TreeMismatchError: `start` and `base` differ in a path or a shape.
        NonFiniteError: a network holds NaN, or what was learned does.

    Reference:
        Hinton et al. 2015, arXiv:1503.02531; from a specialist of one base to a student on another: Wang et al. 2024,
        arXiv:2405.17258; anchor: Li et al. 2018, arXiv:1802.01483. Differs: chooses on held-out inputs without labels.
    """
    if targets not in TARGETS:
        raise unknown_name("targets", targets, TARGETS)
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be positive.")
    key = jax.random.key(0) if key is None else key
    base = start if base is None else base
    check_same({"base": base, "start": start})
    for name, params in (("the teacher", teacher), ("start", start), ("base", base)):
        check_finite(name, params)
    loss, taught = teach_sample(
        sample, teacher, start, targets=targets, temperature=temperature, forward=teacher_forward
    )
    if validation is not None:
        _, validation = teach_sample(
            validation, teacher, start, targets=targets, temperature=temperature, forward=teacher_forward
        )
    keep = kept = None
    if support is not None:
        check_sample(support, base, is_labelled=support.is_labelled)
        keep, kept = KeepLoss(support.forward, support.is_labelled), told(support, base)
        support_validation = None if support_validation is None else told(support_validation, base)
    learnable = choose_learnable(
        learn, named_key(key, "factors"), base, start, rank=lora_rank, patterns=lora_patterns, spec=spec
    )
    return run_descent(
        sample=taught, start=start, learnable=learnable, aim=Aim(loss, keep, protect, anchor, weight_decay),
        key=named_key(key, "distill"), num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate,
        rate_factor=rate_factor, held_out=held_out, validation=validation, margin=margin, errors=errors,
        schedule_steps=schedule_steps, support=kept, held_support=support_validation, base=base, series=series,
    )  # fmt: skip


def teach_sample(
    sample: Sample,
    teacher: Params,
    student: Params,
    *,
    targets: str = "soft",
    temperature: float = 1.0,
    forward: Callable[[Params, Batch], jax.Array] | None = None,
) -> tuple[Loss, Sample]:
    """(the student's loss, the sample with what the teacher says)."""
    check_sample(sample, student, is_labelled=targets == "labels")
    if targets == "labels":
        return LabelLoss(sample.forward), sample
    asked = sample.without_labels() if forward is None else replace(sample.without_labels(), forward=forward)
    logits = predict(asked, teacher)
    if targets == "soft":
        return TeacherLoss(sample.forward, temperature), told(sample.without_labels(), logits=logits)
    labels = np.argmax(logits, axis=-1).astype(np.int32)
    return LabelLoss(sample.forward), replace(sample, batch={**sample.without_labels().batch, "label": labels})


def told(sample: Sample, teacher: Params | None = None, *, logits: np.ndarray | None = None) -> Sample:
    """The sample with the teacher's logits, asked for here or known already."""
    logits = predict(sample, teacher) if logits is None else logits
    return replace(sample, batch={**sample.batch, "teacher": logits})


def choose_learnable(
    learn: str,
    key: jax.Array,
    base: Params,
    start: Params,
    *,
    rank: int,
    patterns: Sequence[str],
    spec: Spec | None = None,
) -> Learnable:
    """What is learned, by name.

    Raises:
        UnknownNameError: no such name.
        ConfigError: "rotation" without a spec, or as `teach.weights`.
    """
    if learn not in LEARN:
        raise unknown_name("learn", learn, LEARN)
    if learn == "lora":
        return low_rank(key, start, rank=rank, patterns=patterns)
    if learn == "scales":
        return block_scales(base, start)
    if learn == "rotation":
        if spec is None:
            raise ConfigError("learn='rotation' needs spec=, which says what lies on the residual stream.")
        return turned_scales(base, start, spec)
    return whole_weights(start)


def run_descent(
    *,
    sample: Sample,
    start: Params,
    learnable: Learnable,
    aim: Aim,
    key: jax.Array,
    num_steps: int,
    batch_size: int,
    learning_rate: float | Sequence[float] | None,
    held_out: float,
    rate_factor: float = 1.0,
    validation: Sample | None = None,
    margin: float = 0.0,
    errors: float = LEAVING,
    schedule_steps: int | None = None,
    support: Sample | None = None,
    held_support: Sample | None = None,
    base: Params | None = None,
    series: Series | None = None,
) -> Distilled:
    """`descend` with a share held out, or `validation` in its place; one rate where there is nothing to choose by."""
    held = validation
    if held is None:
        sample, held = hold_out(sample, held_out, key)
    if support is not None and held is not None and held_support is None:
        support, held_support = hold_out(support, held_out, named_key(key, "support"))
    if learning_rate is None:
        rates = learnable.rates if held is not None else learnable.rates[len(learnable.rates) // 2 :][:1]
        rates = [rate * rate_factor for rate in rates]
    else:
        rates = np.atleast_1d(np.asarray(learning_rate, float)).tolist()
    params, info = descend(
        learnable, aim, sample, key=key, num_steps=num_steps, batch_size=batch_size, learning_rates=rates, held=held,
        support=support, held_support=held_support, base=base, margin=margin, errors=errors,
        schedule_steps=schedule_steps, series=series,
    )  # fmt: skip
    return Distilled(round_to(params, start), {**info, "num_examples": len(sample)})
