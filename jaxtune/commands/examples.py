"""A few examples that a user names, as a sample for networks of one architecture."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune import opening
from jaxtune.checkpoint import Checkpoint
from jaxtune.commands.pairs import parse_pairs
from jaxtune.errors import ConfigError
from jaxtune.sample import Sample

DEFAULT_SAMPLES = 64
READ_LABELS_IF_THERE = ("align_then_mask",)  # of the methods that need none


@dataclass(frozen=True)
class Given:
    """What the arguments say about examples: those of the task, those to keep, and what to do with them at the end."""

    sample: Sample | None
    keep: Sample | None
    polish: str


def open_given(arguments: Any, needed: str, config: Any, model: Checkpoint) -> Given:
    """Examples for the method or the polish; an argument that nothing would read is refused.

    Args:
        arguments: Of `jaxtune transport`.
        needed: `data` of the transport method.
        config: Architecture of the networks.
        model: Whose tokenizer texts are read by.

    Raises:
        ConfigError: examples are missing, or nothing would look at them.
        DataError: as `open_examples`.
    """
    if arguments.data is None:
        for name in ("samples", "keep", "data_option", "keep_option"):
            if getattr(arguments, name):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} goes with --data DATA, which says where examples are.")
        if needed != "none" or arguments.polish == "distill":
            what = f"--polish {arguments.polish}" if needed == "none" else f"--method {arguments.method}"
            raise ConfigError(f"{what} needs {'unlabelled inputs' if needed == 'none' else needed}: give --data DATA.")
        return Given(None, None, "none")
    polish = arguments.polish
    if polish == "auto":
        polish = "distill" if arguments.method == "auto" else "none"
    if needed == "none" and polish == "none":
        raise ConfigError(
            f"--data: method {arguments.method!r} does not look at examples, and --polish is none. Ask for --polish "
            "distill, or for a method that does (`jaxtune methods`)."
        )
    if arguments.keep and polish == "none":
        raise ConfigError("--keep goes with a polish: give --polish distill.")
    how = {"num_examples": arguments.samples, "seed": arguments.seed}
    sample = open_examples(
        arguments.data, arguments.data_option, config, model, needs_labels=needed == "labelled examples", **how
    )
    if arguments.keep_option and not arguments.keep:
        raise ConfigError("--keep-option goes with --keep DATA.")
    keep = open_examples(arguments.keep, arguments.keep_option, config, model, **how) if arguments.keep else None
    return Given(sample, keep, polish)


def describe_given(arguments: Any, given: Given, needed: str) -> dict[str, Any] | None:
    """For the report: where examples came from, how many, whether the method reads their labels (`needed`), and a hash
    of them; None without any."""
    if given.sample is None:
        return None
    return {
        "data": arguments.data,
        "options": list(arguments.data_option),
        "num_examples": len(given.sample),
        "are_labelled": given.sample.is_labelled,
        "are_labels_read": given.sample.is_labelled
        and (needed == "labelled examples" or arguments.method in READ_LABELS_IF_THERE),
        "are_classes_known": given.sample.is_labelled or getattr(given.sample.forward, "embeddings", None) is not None,
        "sha256": hash_sample(given.sample),
        "polish": given.polish,
        "keep": None if given.keep is None else {"data": arguments.keep, "num_examples": len(given.keep)},
    }


def open_examples(
    name: str,
    pairs: Sequence[str],
    config: Any,
    model: Checkpoint,
    *,
    num_examples: int | None,
    seed: int,
    needs_labels: bool = False,
) -> Sample:
    """Examples of what a user named: of its train split, or of the one among the options.

    Args:
        name: An .npz file, texts as .jsonl or .jsonl.gz, or a built-in source.
        pairs: Options of the source as NAME=VALUE, for instance task=clinc_banking.
        config: Architecture of the networks.
        model: Whose tokenizer texts are read by, where it has one.
        num_examples: At most so many, drawn by chance; None: `DEFAULT_SAMPLES`.
        seed: Of the draw.
        needs_labels: Whether examples without labels are refused.

    Raises:
        DataError: no such data, or it does not fit the network.
        ConfigError: an option that is not NAME=VALUE.
    """
    options = parse_pairs(pairs)
    split = str(options.pop("split", "train"))
    count = DEFAULT_SAMPLES if num_examples is None else num_examples
    return opening.open_examples(
        config,
        name,
        models=[model],
        split=split,
        num_examples=count,
        seed=seed,
        needs_labels=needs_labels,
        options=options,
    )


def hash_sample(sample: Sample) -> str:
    """SHA-256 of the examples themselves, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(sample.batch):
        values = np.ascontiguousarray(sample.batch[name])
        digest.update(f"{name} {values.dtype.str} {values.shape} ".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
