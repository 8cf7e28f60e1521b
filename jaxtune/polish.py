"""What a few examples make of a transport that is done: distillation of the fine-tune into the moved network."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.symmetry.spec import Spec
from jaxtune.teach.descent import round_to
from jaxtune.teach.distill import Distilled, KeepLoss, distill, teach_sample, told
from jaxtune.teach.judging import LEAVING, add_gains, each_loss, find_gain, hold_out
from jaxtune.transport.prepared import Prepared
from jaxtune.tree import task_vector
from jaxtune.types import Params

POLISHES = ("none", "distill")
NUM_HELD, HELD_SHARE = 4, 0.2  # examples that choose rate and steps: at least so many, or this share of them
NUM_JUDGES = 50  # examples that give the verdict, or all: a dozen have overlooked a gain of 25 points of accuracy
RATE_FACTOR = 1 / 3  # of distillation's rates
TASK_COST = 0.02  # of the mean of exp(-loss), which giving back the base's skills may cost the task


def polish_transport(
    key: jax.Array,
    prepared: Prepared,
    params: Params,
    finetuned: Params,
    target: Params,
    sample: Sample | None,
    *,
    polish: str,
    keep: Sample | None = None,
    spec: Spec | None = None,
    num_steps: int = 150,
    margin: float = 0.0,
    **options: Any,
) -> tuple[Params, Prepared]:
    """The moved network, taught on the sample's inputs to say what the old base's fine-tune says of them.

    Of eight examples or more a part is held out that chooses the rate and the number of steps. With these the network
    is taught again with other parts held out, until `NUM_JUDGES` examples, or all, have been asked of a network that
    did not learn from them. The result is the mean of these networks, which start from one and lie close together; it
    stays out where the examples do not see them surely better than the start (one side of 95 %, of the mean of
    `exp(-loss)`). With `keep` it is enough that they are surely better at both together and cost the task less
    than `TASK_COST`. Of fewer than eight the middle rate takes all the steps, and nothing judges what comes of it.

    Args:
        key: Of the order of the examples.
        prepared: What moved the task vector.
        params: The target with the moved task vector.
        finetuned: The teacher; labels of the sample are not read.
        target: The new base.
        sample: Inputs of the task.
        polish: One of `POLISHES`.
        keep: Inputs on which the result is to stay as the new base is; with labels half of the penalty is on them.
        spec: Symmetry of the target, for learn="rotation".
        num_steps: With each learning rate.
        margin: What the verdict asks for at least, beside being sure.
        **options: Of `teach.distill.distill`; `held_out` is the size of a part, 0 for no choice and no verdict.

    Returns:
        (network, prepared): the task vector is what both steps added to the target; `info["polish"]` says what was
        chosen and what the examples saw. It moves no further fine-tune: the polish is of this one.

    Raises:
        UnknownNameError: no such polish.
        ConfigError: no sample, or as `distill`.
        JaxtuneError: as `distill`.

    Reference:
        Distillation: see `distill`. Mean of networks of one start: Wortsman et al. 2022, arXiv:2203.05482.
    """
    if polish not in POLISHES:
        raise unknown_name("polish", polish, POLISHES)
    if polish == "none":
        return params, prepared
    if sample is None:
        raise ConfigError(f"polish {polish!r} needs examples: pass sample= (on the command line --data).")
    sample = sample.without_labels()
    if options.get("learn", "weights") == "weights":  # a third of distillation's own rates: they keep the base's skills
        options.setdefault("rate_factor", RATE_FACTOR)
    if "held_out" not in options and len(sample) >= 2 * NUM_HELD:
        options["held_out"] = max(HELD_SHARE, NUM_HELD / len(sample))
    options["num_steps"] = num_steps
    teach = partial(distill, teacher=finetuned, start=params, key=key, base=target, spec=spec)
    parts = _hold_out_in_turn(sample, options.get("held_out", 0.0), key)
    if parts:
        students, verdict = _teach_in_turn(teach, parts, _keep_in_turn(keep, len(parts), key), options, margin=margin)
    else:
        verdict = {"verdict": "not judged", "num_judges": 0}
        students = [teach(sample, support=keep, **options)]
    if verdict["verdict"] != "left out":
        params = round_to(jax.tree.map(_mean, *(student.params for student in students)), params)
    said = {name: value for name, value in options.items() if name not in ("series", "teacher_forward")}
    info = {"name": polish, "options": said, **students[0].info, **verdict}
    prepared = replace(
        prepared, task_vector=task_vector(target, params), info={**prepared.info, "polish": info}, move=None
    )
    return jax.tree.map(np.asarray, params), prepared


def _hold_out_in_turn(sample: Sample, fraction: float, key: jax.Array) -> list[tuple[Sample, Sample]]:
    """[(what is learned on, what is held out)], the latter disjoint; none where too few would be held."""
    first = hold_out(sample, fraction, key)
    if first[1] is None:
        return []
    num_held = len(first[1])
    num_turns = min(len(sample) // num_held, -(-NUM_JUDGES // num_held))
    return [first, *(hold_out(sample, fraction, key, turn=turn) for turn in range(1, num_turns))]


def _keep_in_turn(keep: Sample | None, num_turns: int, key: jax.Array) -> list[tuple[Sample | None, Sample | None]]:
    """The same of what is to be kept, as often; (None, None) and (all, None) where there is none, and too little."""
    if keep is None:
        return [(None, None)] * num_turns
    key, fraction = named_key(key, "keep"), HELD_SHARE
    held = hold_out(keep, fraction, key)[1]
    own_turns = 1 if held is None else len(keep) // len(held)
    return [hold_out(keep, fraction, key, turn=turn % own_turns) for turn in range(num_turns)]


def _teach_in_turn(
    teach: Callable[..., Distilled],
    parts: Sequence[tuple[Sample, Sample]],
    kept: Sequence[tuple[Sample | None, Sample | None]],
    options: dict[str, Any],
    *,
    margin: float,
) -> tuple[list[Distilled], dict[str, Any]]:
    """(a student of every part, and whether the examples that it did not learn from see it better than the start)."""
    how = [{"support": rest, "support_validation": held} for rest, held in kept]
    (rest, held), *others = parts
    students = [teach(rest, validation=held, errors=0.0, **how[0], **options)]
    rate, step = (students[0].info[name] for name in ("learning_rate", "step"))
    if step:
        again = {name: value for name, value in options.items() if name != "series"}
        again |= {"held_out": 0.0, "learning_rate": rate, "num_steps": step, "schedule_steps": options["num_steps"]}
        students += [
            teach(rest, support=one["support"], **again) for (rest, _), one in zip(others, how[1:], strict=True)
        ]
    judged = list(zip(students, parts, kept, strict=False))  # where no step helped, the first part has said so
    asked = [_ask_both(teach, student, held, options) for student, (_, held), _ in judged]
    before, after = np.concatenate(asked, axis=1)
    gain, error = find_gain(before, after)
    is_better = gain > max(margin, LEAVING * error)
    verdict = {
        "num_judges": len(before),
        "gain": gain,
        "gain_error": error,
        "likeness": [float(np.mean(np.exp(-loss))) for loss in (before, after)],
    }
    if kept[0][1] is not None:
        asked = [_ask_both_to_keep(teach, student, held) for student, _, (_, held) in judged]
        own = find_gain(*np.concatenate(asked, axis=1))
        both = add_gains((gain, error), own, options.get("protect", 1.0))
        is_better |= both[0] > max(margin, LEAVING * both[1]) and gain > -TASK_COST
        verdict |= {"kept_gain": own[0], "kept_gain_error": own[1]}
    return students, verdict | {"verdict": "kept" if is_better else "left out"}


def _ask_both(teach, student, held, options):
    """float64[2, N]: the loss of held-out examples under the start and under the student."""
    start = teach.keywords["start"]
    asked = {
        "targets": options.get("targets", "soft"),
        "temperature": options.get("temperature", 1.0),
        "forward": options.get("teacher_forward"),
    }
    loss, told_sample = teach_sample(held, teach.keywords["teacher"], start, **asked)
    return np.stack([each_loss(loss, told_sample, params) for params in (start, student.params)])


def _ask_both_to_keep(teach, student, held):
    """The same of examples on which the new base is to stay as it is."""
    loss, told_sample = KeepLoss(held.forward, held.is_labelled), told(held, teach.keywords["base"])
    return np.stack([each_loss(loss, told_sample, params) for params in (teach.keywords["start"], student.params)])


def _mean(*leaves):
    return np.mean([np.asarray(leaf, np.float32) for leaf in leaves], axis=0)
