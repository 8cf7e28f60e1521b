"""A few examples that a user names become a sample: one way for transports, alignments, recipes and compositions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxtune.checkpoint import Checkpoint
from jaxtune.data.parts import take_sample
from jaxtune.data.source import DataSource, SplitMissingError, has_cut, may_lack_labels, open_source
from jaxtune.data.stored_tokens import TOKENIZER_NAME, read_tokenizer
from jaxtune.data.text_files import SUFFIXES
from jaxtune.errors import ConfigError, DataError
from jaxtune.sample import Sample
from jaxtune.sampling import check_kind, make_sample, make_text_sample, predicts_tokens

MAX_LENGTH = 256  # tokens of a text whose model would take more
# Files that say what a model's token ids mean; with one of them beside the weights no other numbering makes sense.
VOCABULARY_NAMES = (TOKENIZER_NAME, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def open_examples(
    config: Any,
    data: DataSource | str | Path,
    *,
    models: Sequence[Any] = (),
    split: str = "train",
    is_cut_refused: bool = False,
    num_examples: int | None = None,
    seed: int = 0,
    needs_labels: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Sample:
    """Examples of a task for networks of one architecture; those of a language model are texts.

    Args:
        config: Architecture of the networks.
        data: An open source, or what `data.open_source` opens.
        models: Texts are read by the tokenizer of the first that has one; bare trees have none.
        split: Of a source that is opened here.
        is_cut_refused: Whether a validation split that the source does not hold, and that would be cut from train, is
            an error; `validation_fraction` among the options asks for the cut.
        num_examples: At most so many, drawn by chance; None: all.
        seed: Of the draw.
        needs_labels: Whether examples without labels are refused.
        options: Of a source that is opened here, its own.

    Raises:
        DataError: no such data, or it does not fit the network; a model has a vocabulary of its own that is not read.
        ConfigError: a number out of range, or options for a source that is open.
    """
    if num_examples is not None and num_examples < 1:
        raise ConfigError(f"num_examples is {num_examples}; it must be at least 1.")
    is_language = predicts_tokens(config)
    if is_language and needs_labels:
        raise DataError(f"{data}: a language model has no classes to learn labels of; use a method without labels.")
    if isinstance(data, str | Path):
        if may_lack_labels(data):  # a file: its ending says what it holds
            check_kind(str(data), config, ("text",) if str(data).endswith(SUFFIXES) else ("image",))
        if str(data).endswith(SUFFIXES):
            options = {**options, **_own_tokens(str(data), options, config, models)}
        if may_lack_labels(data):
            options = {"allow_unlabelled": not needs_labels, **options}
        source = _open(str(data), split, options, is_cut_refused=is_cut_refused)
    elif options:
        raise ConfigError(f"options {', '.join(options)} are for a source that is opened here; this one is open.")
    else:
        source = data
    try:
        if is_language:
            few = source if num_examples is None else take_sample(source, num_examples, seed=seed)
            return make_text_sample(config, few)
        return make_sample(config, source, num_examples=num_examples, seed=seed, needs_labels=needs_labels)
    except DataError as error:
        if source is data or not may_lack_labels(data):
            raise
        raise DataError(f"{data}: {error}") from error  # a sample's name is short; a file has a path


def _open(name, split, options, *, is_cut_refused):
    if split != "validation" or not is_cut_refused or "validation_fraction" in options or not has_cut(name):
        return open_source(name, split, **options)
    try:
        return open_source(name, split, validation_fraction=0.0, **options)
    except SplitMissingError as error:
        raise DataError(
            f"{name}: there is no validation split in it. Examples that choose among models should be none that the "
            "models were fitted to: add such a split, or name one yourself. 'validation' is then cut from train by "
            "chance; 'test' and 'train' are taken as they are."
        ) from error


def _own_tokens(name: str, options: Mapping[str, Any], config: Any, models: Sequence[Any]) -> dict[str, Any]:
    """Options that read texts by a model's own tokenizer; none where the models know no tokens but ours.

    Ids of other words would lie inside most vocabularies, so that nothing later could tell them from the right ones.
    """
    stored = [model for model in models if isinstance(model, Checkpoint)]
    said = next((option for option in ("tokenizer", "tokens") if option in options), None)
    if said == "tokenizer":
        return {}
    own = next((model for model in stored if set(VOCABULARY_NAMES) & set(model.side_files)), None)
    if own is not None and said is not None:
        raise DataError(
            f"{name}: tokens is {options[said]!r}, and {own.path} has a vocabulary of its own. Take tokens out: texts "
            f"are read by its {TOKENIZER_NAME}."
        )
    if own is None and said is None:  # a network of another library, whose tokens are surely not ours
        own = next((model for model in stored if model.network is not None), None)
    if own is None:
        return {}
    longest = getattr(config, "max_length", None) or getattr(config, "num_positions", None) or MAX_LENGTH
    # Windows go over texts of any length.
    length = None if options.get("windows") is not None else min(longest, MAX_LENGTH)
    return {"tokenizer": read_tokenizer(own.path, max_length=length), "is_padded": False}
