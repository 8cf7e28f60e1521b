"""Fine-tuning on the very examples that a method is given: the control that every use of labels has to beat."""

from collections.abc import Sequence

import jax

from jaxtune.compose.composition import check_counts
from jaxtune.gradients import LabelLoss, check_sample
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.teach.descent import Aim, Series
from jaxtune.teach.distill import Distilled, choose_learnable, run_descent
from jaxtune.train.lora import DEFAULT_PATTERNS
from jaxtune.train.same_run import own_states
from jaxtune.tree import check_finite
from jaxtune.types import Params


@own_states()
def tune_few(
    sample: Sample,
    start: Params,
    *,
    key: jax.Array | None = None,
    num_epochs: int = 30,
    min_steps: int = 150,
    batch_size: int = 64,
    learning_rate: float | Sequence[float] | None = None,
    held_out: float = 0.2,
    validation: Sample | None = None,
    weight_decay: float = 0.0,
    lora_rank: int | None = None,
    lora_patterns: Sequence[str] = DEFAULT_PATTERNS,
    series: Series | None = None,
) -> Distilled:
    """Fine-tunes on a few labelled examples for several epochs; rate and length chosen on validation examples.

    Args:
        sample: Labelled examples.
        start: The new base, or a transport onto it.
        key: Of the order of the examples and of LoRA's first factors; None: key 0.
        num_epochs: Passes over the examples with each learning rate, at least `min_steps` updates.
        min_steps: See there; as many as distillation takes.
        batch_size: Examples a step, at most all.
        learning_rate: One, several to choose from, or None: three that go by the size of the weights.
        held_out: Share of the sample that the choice is made by, where that leaves four examples or more.
        validation: Labelled examples to choose by instead.
        weight_decay: Decoupled.
        lora_rank: Of low-rank factors, which alone are learned then; None: all weights.
        lora_patterns: Kernels that get factors.
        series: Where states are kept, as in `teach.distill.distill`.

    Raises:
        ConfigError: a number out of range.
        DataError: no examples, no labels, or labels that are no classes.
        NonFiniteError: `start` holds NaN, or what was learned does.
    """
    check_counts(num_epochs=num_epochs, min_steps=min_steps, batch_size=batch_size)
    key = jax.random.key(0) if key is None else key
    check_finite("start", start)
    for one in (sample, validation):
        if one is not None:
            check_sample(one, start, is_labelled=True)
    learn = "weights" if lora_rank is None else "lora"
    num_steps = max(min_steps, -(-num_epochs * len(sample) // min(batch_size, len(sample))))
    return run_descent(
        sample=sample, start=start,
        learnable=choose_learnable(
            learn, named_key(key, "factors"), start, start, rank=lora_rank or 0, patterns=lora_patterns
        ),
        aim=Aim(LabelLoss(sample.forward), weight_decay=weight_decay), key=named_key(key, "few"), num_steps=num_steps,
        batch_size=batch_size, learning_rate=learning_rate, held_out=held_out, validation=validation, series=series,
    )  # fmt: skip
