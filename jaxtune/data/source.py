"""What a data source is, and how one is opened by name."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxtune.errors import DataError, unknown_name

SPLITS = ("train", "validation", "test")

# Name -> module and function that opens it, (split, **options) -> DataSource; imported when asked for.
NAMED = {
    "digits": ("jaxtune.data.digits", "open_digits"),
    "glyphs": ("jaxtune.data.glyphs", "open_glyphs"),
}
# Ending of a path -> module and function that opens such a file.
FILES = {
    ".npz": ("jaxtune.data.arrays", "open_npz"),
    ".jsonl": ("jaxtune.data.texts", "open_texts"),
    ".jsonl.gz": ("jaxtune.data.texts", "open_texts"),
}


class SplitMissingError(DataError):
    """A source holds no validation split, and none was cut from train."""


@runtime_checkable
class DataSource(Protocol):
    """Examples, found by index; a record is the same whenever and with whomever it is asked for.

    Images or texts, mostly with labels; a source without them says so by records that have no "label".

    Attributes:
        name: What it is called in reports.
        split: One of `SPLITS`.
        class_names: Name of each label; a frozen read-out makes its class embeddings from them. Empty where no
            classes are known.
    """

    name: str
    split: str
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One record: "image" float32[H, W, C] in [0, 1], or "text" int32[L] and "mask" bool[L]; "label" int32[]."""

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """A batch of them: every array with N in front."""


def open_source(name: str | Path, split: str, **options: Any) -> DataSource:
    """Opens the data source that `name` names.

    Args:
        name: "digits", "glyphs", "tfds:<name>", the path of an .npz file (images), or of a .jsonl or .jsonl.gz file
            (texts).
        split: "train", "validation" or "test".
        **options: The source's own: see `open_digits`, `open_glyphs`, `open_tfds`, `open_npz`, `open_texts`. All have
            `class_prefix`, put before every class name. A frozen read-out gives equal names equal
            embeddings, so without a prefix the digits of two sets are one set of ten classes, and
            with class_prefix="mnist/" they are classes of their own.

    Raises:
        UnknownNameError: no such source, split, or option of the source; lists the known ones.
        DataError: an .npy file, or as the source.
    """
    name = str(name)
    if name in NAMED:
        opener = _import(NAMED[name])
        check_options(f"data source {name!r}", opener, options)
        return opener(split, **options)
    if name.startswith("tfds:"):
        from jaxtune.data.tfds import open_tfds

        check_options("data source 'tfds:'", open_tfds, options)
        return open_tfds(name.removeprefix("tfds:"), split, **options)
    for ending, place in FILES.items():
        if name.endswith(ending):
            opener = _import(place)
            check_options(f"data source {ending!r}", opener, options)
            return opener(name, split, **options)
    if name.endswith(".npy"):
        raise DataError(
            f"{name}: an .npy file holds one array, and nothing says of which split. Save it as an .npz: "
            'np.savez("x.npz", train_x=images, train_y=labels), where nothing needs labels without train_y.'
        )
    raise unknown_name("data source", name, (*NAMED, "tfds:<name>", *(f"<path>{end}" for end in FILES)))


def may_lack_labels(name: str | Path) -> bool:
    """Whether a source of this name has the option `allow_unlabelled`."""
    return str(name).endswith(tuple(FILES))


def has_cut(name: str | Path) -> bool:
    """Whether a source of this name has the option `validation_fraction`: what it does not hold is cut from train."""
    return str(name).endswith(tuple(FILES)) or str(name).startswith("tfds:")


def _import(place):
    module, function = place
    return getattr(importlib.import_module(module), function)


def check_split(name: str, split: str) -> None:
    """Raises `UnknownNameError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise unknown_name(f"split of {name}", split, SPLITS)


def check_options(kind: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Checks options against the keyword-only arguments of `function`, so that a misspelt one fails by name.

    Raises:
        UnknownNameError: lists the known options.
        DataError: one without a default is missing.
    """
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {kind}", option, known or ("(none)",))
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise DataError(f"{kind} needs {', '.join(missing)}.")


def check_indices(source: DataSource, indices: Sequence[int]) -> np.ndarray:
    """int64[N], each in 0 … len(source) - 1; an index from behind would be a second name of a record.

    Raises:
        IndexError: one lies outside. Iterating over a source ends by it, as Python's protocol wants.
    """
    indices = np.atleast_1d(np.asarray(indices, np.int64))
    if indices.size and not (indices.min() >= 0 and indices.max() < len(source)):
        raise IndexError(
            f"{source.name} ({source.split}): indices {indices.min()} to {indices.max()} asked, "
            f"it has {len(source)} records."
        )
    return indices
