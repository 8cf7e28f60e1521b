"""Texts and labels held in memory, and windows over long texts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtune.data.arrays import cut_by_class
from jaxtune.data.source import SplitMissingError, check_indices, check_split
from jaxtune.data.text_files import TextFile, read_text_file, stem_of
from jaxtune.data.tokens import PAD_ID, TOKENS, Given, Tokenizer, Tokens, learn_tokens, pad_tokens
from jaxtune.errors import DataError, unknown_name

MULTIPLE = 8  # lengths that are found rather than asked for are multiples of it


class TextSource:
    """A `DataSource` of texts: {"text": int32[L], "mask": bool[L]} and, where it is known, "label" int32[].

    Args:
        name: As reports should call it.
        split: One of `data.SPLITS`.
        text: Token ids.
        mask: True where a token is real.
        labels: Index into `class_names` of each text; None without labels.
        class_names: One per class.
        vocab_size: Ids lie below.
        num_cut: How many texts lost their last tokens.

    Shapes:
        text: int32[N, L]; mask: bool[N, L]; labels: int[N].

    Raises:
        DataError: there are no records.
    """

    def __init__(
        self,
        name: str,
        split: str,
        text: np.ndarray,
        mask: np.ndarray,
        labels: np.ndarray | None,
        class_names: Sequence[str],
        *,
        vocab_size: int,
        num_cut: int = 0,
    ):
        self.name, self.split, self.class_names = name, split, tuple(class_names)
        self.vocab_size, self.num_cut = vocab_size, num_cut
        self._columns = {"text": text, "mask": mask}
        if labels is not None:
            self._columns["label"] = labels.astype(np.int32)
        if not len(text):
            raise DataError(f"{name} ({split}): there are no records.")

    def __len__(self) -> int:
        return len(self._columns["text"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        indices = check_indices(self, indices)
        return {key: values[indices] for key, values in self._columns.items()}


def open_texts(
    path: str | Path,
    split: str,
    *,
    task: str | None = None,
    tokens: str = "words",
    length: int | None = None,
    windows: int | None = None,
    vocab_size: int = 4096,
    num_hashed: int = 256,
    vocabulary: str | Path | Sequence[str | Path] | None = None,
    tokenizer: Tokenizer | None = None,
    is_padded: bool = True,
    pad_id: int = PAD_ID,
    validation_fraction: float = 0.1,
    seed: int = 0,
    class_prefix: str = "",
    allow_unlabelled: bool = False,
) -> TextSource:
    """Opens a split of a `.jsonl` or `.jsonl.gz` file of texts; nothing that a line names is ever opened.

    Args:
        path: One JSON object a line: "task", "split" (train, val or validation, test), "text", "label" (0 …) and
            "label_name".
        split: Where the task has no validation texts, a share of train is cut off for them, and train is the rest.
        task: Which one, where the file has several.
        tokens: "words" (`Words`), "bytes" (`Bytes`) or "characters" (`Characters`). Words and characters are learnt on
            the train texts of all tasks of the file, so that its tasks share their ids.
        length: Tokens of every record, start and end included; longer texts lose their last ones (`num_cut` says how
            many did). None: the longest text of the file, at a multiple of 8, so that its tasks share their shape.
        windows: Instead of one record a text: the texts of the split, one behind another with the end (where the tokens
            have one) between them, in windows of so many tokens, for language models. The last token of a window is the
            first of the next, so that every token but the very first is predicted once. No labels.
        vocab_size, num_hashed: Of "words".
        vocabulary: The file or files to learn words or characters on instead, so that tasks of several files share ids.
        tokenizer: The checkpoint's own, instead of `tokens`: texts -> rows of ids, whatever length.
        is_padded: Whether trailing `pad_id` of its rows are padding, and no tokens of the text.
        pad_id: Id behind a text; the mask is False there.
        validation_fraction, seed: Of the cut; every class gives its share.
        class_prefix: Put before every class name.
        allow_unlabelled: Whether a task without labels opens without `windows`; its records have no "label".

    Raises:
        UnknownNameError: no such split, task, or kind of tokens.
        DataError: the file or a line of it is damaged, or the split or the labels are missing; names file and line.
    """
    path = Path(path)
    check_split(str(path), split)
    if tokens not in TOKENS:
        raise unknown_name("kind of tokens", tokens, TOKENS)
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(f"{path}: validation_fraction must be in [0, 1), got {validation_fraction}.")
    if length is not None and windows is not None:
        raise DataError(f"{path}: give length (one record a text) or windows (texts in a row), not both.")
    for option, value, least in (("length", length, 3), ("windows", windows, 2)):
        if value is not None and value < least:
            raise DataError(f"{path}: {option} is {value}; it must be at least {least}.")
    file = read_text_file(path)
    task = file.find_task(task)
    names = [class_prefix + name for name in file.classes[task]]
    if not names and windows is None and not allow_unlabelled:
        raise DataError(
            f"{path}: the texts of task {task!r} have no labels. For a language model give windows=LENGTH; else "
            'give every line a "label". What needs no labels takes such a file as it is.'
        )
    records = _records(file, split, task, validation_fraction, seed)
    name = stem_of(path) if len(file.classes) == 1 else task
    if tokenizer is not None:
        numbering = Given(tokenizer, pad_id, is_padded=is_padded)
    else:
        learnt_on = (path,) if vocabulary is None else vocabulary
        numbering = learn_tokens(tokens, learnt_on, vocab_size=vocab_size, num_hashed=num_hashed)
    rows = numbering.encode_all([record.text for record in records])
    if windows is not None:
        text, mask = _cut_windows(path, split, rows, windows, numbering.end, pad_id)
        return TextSource(name, split, text, mask, None, (), vocab_size=numbering.vocab_size)
    if length is None:
        length = _longest(file, numbering)
    text, mask, num_cut = pad_tokens(rows, length, numbering, pad_id=pad_id)
    labels = np.array([record.label for record in records], np.int32) if names else None
    return TextSource(name, split, text, mask, labels, names, vocab_size=numbering.vocab_size, num_cut=num_cut)


def _records(file: TextFile, split: str, task: str, fraction: float, seed: int):
    """The records of a split; a validation split that the file lacks is cut from train."""
    records = file.of(split, task)
    if split == "test" or file.of("validation", task):
        if not records:
            raise DataError(_no_texts(file, split, task))
        return records
    train = file.of("train", task)
    if not train:
        raise SplitMissingError(_no_texts(file, split, task))
    labels = np.array([record.label or 0 for record in train], np.int64)
    is_held = cut_by_class(labels, fraction, seed)
    kept = [record for record, held in zip(train, is_held, strict=True) if held == (split == "validation")]
    if not kept:
        raise SplitMissingError(
            f"{file.path}: task {task!r} has no validation texts, and a validation_fraction of {fraction} of its "
            f"{len(train)} train texts leaves none for {split}. Give a larger fraction; some class must have two texts."
        )
    return kept


def _no_texts(file, split, task):
    """Words where a task has no texts of a split."""
    there = list(dict.fromkeys(record.split for record in file.records if record.task == task))
    return (
        f"{file.path}: task {task!r} has no {split} texts, only {', '.join(there)}. Ask for what is there "
        f"(split={there[0]}), or add lines of that split."
    )


def _longest(file: TextFile, numbering: Tokens) -> int:
    """Tokens of the longest text of a file, with start and end, at a multiple of `MULTIPLE`."""
    longest = max(map(len, numbering.encode_all([record.text for record in file.records])))
    longest += (numbering.start is not None) + (numbering.end is not None)
    return -(-longest // MULTIPLE) * MULTIPLE


def _cut_windows(path, split, rows, length, end, pad_id):
    """int32[N, length] and its mask: each begins with the last token of the one before."""
    between = [] if end is None else [end]
    stream = np.concatenate([np.asarray([*(between if n else []), *row], np.int32) for n, row in enumerate(rows)])
    if len(stream) < 2:
        raise DataError(f"{path} ({split}): {len(stream)} tokens are too few for a window.")
    starts = np.arange(0, len(stream) - 1, length - 1)
    place = starts[:, None] + np.arange(length)[None]
    mask = place < len(stream)
    return np.where(mask, stream[np.minimum(place, len(stream) - 1)], np.int32(pad_id)), mask
