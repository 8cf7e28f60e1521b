"""What a fine-tune's own labelled examples say against the way in which its outputs are read."""

import numpy as np

from jaxtune.gradients import predict
from jaxtune.sample import Sample
from jaxtune.types import Params

SURE = 2.0  # standard errors of a guess


def doubt_names(sample: Sample, finetuned: Params) -> str | None:
    """What to say where a network that is read by the names of classes guesses on its own task; None where all is well.

    Args:
        sample: Labelled examples of the task; others say nothing.
        finetuned: The network that was tuned on it.
    """
    embeddings = getattr(sample.forward, "embeddings", None)
    if embeddings is None or not sample.is_labelled or sample.batch["label"].ndim != 1:
        return None
    right = np.mean(predict(sample, finetuned).argmax(axis=-1) == sample.batch["label"])
    return doubt(float(right), len(sample), num_classes=len(embeddings.array), num_outputs=embeddings.array.shape[1])


def doubt(accuracy: float, num_examples: int, *, num_classes: int, num_outputs: int) -> str | None:
    """The same of an accuracy that is known."""
    chance = 1 / num_classes
    if accuracy > chance + SURE * (chance * (1 - chance) / num_examples) ** 0.5:
        return None
    return (
        f"{100 * accuracy:.0f} % of {num_examples} labelled examples of its own task right, where {100 * chance:.0f} % "
        f"is chance. Its {num_outputs} outputs are read by the names of the {num_classes} classes: the data must call "
        "them what the fine-tuning did. The option class_prefix=WORD/ puts a word in front of each"
    )
