"""What a few examples make of a transport that is done: distillation of the fine-tune into the moved network."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.sample import Sample
from jaxtune.symmetry.spec import Spec
from jaxtune.teach.distill import distill
from jaxtune.transport.prepared import Prepared
from jaxtune.tree import task_vector
from jaxtune.types import Params

POLISHES = ("none", "distill")
NUM_HELD, HELD_SHARE = 4, 0.2  # examples that a polish is judged by: at least so many, or this share of them
RATE_FACTOR = 1 / 3  # of distillation's rates
# Of the mean of exp(-divergence): where the two nearly agree already, a dozen examples cannot tell what a polish costs
# on all others (without it one that was 98.9 % right came out 94.4 % right, nearer to its teacher on those examples).
MARGIN = 0.05


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
    **options: Any,
) -> tuple[Params, Prepared]:
    """The moved network, taught on the sample's inputs to say what the old base's fine-tune says of them.

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
        **options: Of `teach.distill.distill`; of eight examples or more four are held out to judge the polish by, or a
            fifth if that is more, and it stays out where they do not see it surely better, and by `MARGIN` at least
            where an example is one prediction. Of fewer none are: the middle rate takes all the steps, and nothing
            judges what comes of it.

    Returns:
        (network, prepared): the task vector is what both steps added to the target; `info["polish"]` says what was
        chosen. It moves no further fine-tune: the polish is of this one.

    Raises:
        UnknownNameError: no such polish.
        ConfigError: no sample, or as `distill`.
        JaxtuneError: as `distill`.
    """
    if polish not in POLISHES:
        raise unknown_name("polish", polish, POLISHES)
    if polish == "none":
        return params, prepared
    if sample is None:
        raise ConfigError(f"polish {polish!r} needs examples: pass sample= (on the command line --data).")
    if "held_out" not in options and len(sample) >= 2 * NUM_HELD:
        options["held_out"] = max(HELD_SHARE, NUM_HELD / len(sample))
    # A text is many predictions: a dozen of them see small gains well.
    options.setdefault("margin", 0.0 if "valid" in sample.batch else MARGIN)
    if options.get("learn", "weights") == "weights":  # a third of distillation's own rates: they keep the base's skills
        options.setdefault("rate_factor", RATE_FACTOR)
    made = distill(sample.without_labels(), finetuned, params, key=key, base=target, support=keep, spec=spec, **options)
    params = jax.tree.map(np.asarray, made.params)
    info = {**prepared.info, "polish": {"name": polish, "options": options, **made.info}}
    return params, replace(prepared, task_vector=task_vector(target, params), info=info, move=None)
