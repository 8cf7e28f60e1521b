"""Distillation as a transport: the new base learns from the fine-tuned old one what to say on a few inputs."""

import numpy as np

from jaxtune.errors import unknown_name
from jaxtune.sample import Sample
from jaxtune.teach.distill import distill
from jaxtune.transport.gradfix import ALIGN
from jaxtune.transport.prepared import Prepared, Symmetry, apply_transport
from jaxtune.tree import check_same, is_float, map_leaves, task_vector
from jaxtune.types import Params

STARTS = ("base", *(name for name in ALIGN if name != "none"))


def prepare_distill(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    sample: Sample,
    start: str = "base",
    learn: str = "weights",
    temperature: float = 1.0,
    num_steps: int = 150,
    batch_size: int = 64,
    learning_rate: float | None = None,
    held_out: float = 0.2,
    anchor: float = 0.0,
    lora_rank: int = 8,
) -> Prepared:
    """What distillation adds to the new base, as a task vector: at scale 1 the student.

    Args:
        key: Of the order of the inputs, and of the alignment.
        symmetry: Spec of the bases.
        source, finetuned, target: Old base, its fine-tune (the teacher), new base.
        sample: Inputs of the fine-tune's task; labels are not read.
        start: What the student starts from: the new "base", or a transport of the weights alone.
        learn, temperature, num_steps, batch_size, learning_rate, held_out, anchor, lora_rank: As in
            `teach.distill.distill`.

    Returns:
        `info["distilled"]` says which learning rate and step the student is of. `move` is None: of another fine-tune
        another student has to learn.

    Raises:
        UnknownNameError: no such start or `learn`.
        JaxtuneError: as `distill`, or the transport that it starts from.

    Reference:
        Hinton et al. 2015, arXiv:1503.02531; Wang et al. 2024, arXiv:2405.17258.
    """
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    check_same({"source": source, "finetuned": finetuned, "target": target})
    spec, begun, info, student = symmetry(), None, {}, target
    if start != "base":
        begun = ALIGN[start](key, symmetry, source, finetuned, target)
        info, student = begun.info, apply_transport(begun, target)
    found = distill(
        sample, finetuned, student, key=key, base=target, learn=learn, temperature=temperature, num_steps=num_steps,
        batch_size=batch_size, learning_rate=learning_rate, held_out=held_out, anchor=anchor, lora_rank=lora_rank,
        spec=spec,
    )  # fmt: skip
    vector = task_vector(target, found.params)
    vector = map_leaves(lambda _, leaf: np.asarray(leaf, np.float32) if is_float(leaf) else leaf, vector)
    return Prepared(task_vector=vector, spec=spec, info={**info, "distilled": found.info})
