"""Images and labels held in memory, and the .npz files they come from."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtune.data.record_random import record_bits
from jaxtune.data.source import SPLITS, SplitMissingError, check_indices, check_split
from jaxtune.errors import DataError

_LAYOUT = (
    "Expected train_x, train_y, test_x and test_y (or x_train …, train_images, train_labels …), and optionally "
    "validation_x, validation_y (or val_x …), train_group, test_group and class_names."
)
_WORDS = {"x": "image", "images": "image", "y": "label", "labels": "label", "group": "group"}
_SPLIT_WORDS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_MAX_CHANNELS = 4
_NUM_LISTED = 5  # indices of bad records in an error
_MAGIC_ZIP, _MAGIC_ARRAY = (b"PK\x03\x04", b"PK\x05\x06"), b"\x93NUMPY"  # how files begin that NumPy writes


class ArraySource:
    """A `DataSource` over arrays in memory.

    Bytes stay bytes until a record is asked for: a quarter of the memory of floats.

    Args:
        name: As reports should call it.
        split: One of `SPLITS`.
        images: uint8 on 0 … 255, or floats in [0, 1].
        labels: Index into `class_names` of each image; None where they are not known.
        class_names: One per class, all different; none where neither labels nor names are known.

    Shapes:
        images: uint8 or float[N, H, W] or [N, H, W, C].
        labels: int[N] or [N, 1].

    Raises:
        DataError: there are no records, or the arrays contradict one of the lines above.
    """

    def __init__(
        self, name: str, split: str, images: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str]
    ):
        self.name, self.split, self.class_names = name, split, tuple(class_names)
        where = f"{name} ({split})"
        self._images = _check_images(where, images)
        self._labels = None if labels is None else _check_labels(where, labels, len(self.class_names))
        if self._labels is not None and len(self._images) != len(self._labels):
            raise DataError(f"{where}: {len(self._images)} images but {len(self._labels)} labels.")
        if not len(self._images):
            raise DataError(f"{where}: there are no records.")
        if len(set(self.class_names)) < len(self.class_names):
            repeated = sorted({n for n in self.class_names if self.class_names.count(n) > 1})
            raise DataError(f"{where}: class names must differ, repeated: {', '.join(repeated)}.")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        indices = check_indices(self, indices)
        images = self._images[indices]
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / np.float32(255.0)
        return {"image": images} if self._labels is None else {"image": images, "label": self._labels[indices]}


def open_npz(
    path: str | Path,
    split: str,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    class_prefix: str = "",
    allow_unlabelled: bool = False,
) -> ArraySource:
    """Opens a split of an .npz file; nothing in it is ever unpickled.

    Keys name a split (train, validation or val, test) and what it holds (x or images, y or labels, group),
    in either order: train_x and x_train are the same. Without `class_names` the classes are called "0", "1", ….

    Args:
        path: The file; its stem is the source's name.
        split: Where the file has no validation split, one is cut from train, and train is the rest.
        validation_fraction: Of the train records. Where the file has groups (writers, sessions), whole
            groups are moved, as near to it as they come, so that none is in both; else every class gives
            its share.
        seed: Chooses the cut. The same cut in every NumPy version, so a split never leaks after an upgrade.
        class_prefix: Put before every class name.
        allow_unlabelled: Whether images without labels are a split too; their records have no "label", and groups or
            chance alone cut the validation split.

    Raises:
        DataError: the file is missing or damaged, holds objects, lacks the split, or its arrays do not fit;
            names the file, the key, what was found and what was expected.
    """
    path = Path(path)
    check_split(str(path), split)
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(f"{path}: validation_fraction must be in [0, 1), got {validation_fraction}.")
    tables = _Tables(path, allow_unlabelled=allow_unlabelled)
    is_cut = split != "test" and "validation" not in tables.splits
    stored = "train" if is_cut else split
    if stored not in tables.splits:
        raise tables.missing(split, stored)
    names = [class_prefix + name for name in tables.read_class_names()]
    images = tables.read(stored, "image")
    labels = tables.read(stored, "label") if tables.has(stored, "label") else None
    try:
        whole = ArraySource(path.stem, stored, images, labels, names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if not is_cut:
        return whole
    if tables.has(stored, "group"):
        is_held = _cut_by_group(path, tables.read(stored, "group"), len(whole), validation_fraction, seed)
    else:
        classes = np.zeros(len(whole), np.int32) if labels is None else labels.reshape(-1)
        is_held = cut_by_class(classes, validation_fraction, seed)
    keep = is_held if split == "validation" else ~is_held
    if not keep.any():
        raise SplitMissingError(
            f"{path}: there is no validation split, and a validation_fraction of {validation_fraction} "
            f"of {len(whole)} train records leaves none for one. Give a larger fraction; "
            "with groups there must be two, else two records of some class."
        )
    return ArraySource(path.stem, split, images[keep], None if labels is None else labels[keep], names)


class _Tables:
    """The arrays of one .npz file, found by split and kind."""

    def __init__(self, path, *, allow_unlabelled):
        self._path = path
        with self._open() as file:
            self._names = list(file.files)
        self._keys = {}
        for key in self._names:
            words = re.fullmatch(r"([a-z]+)_([a-z]+)", key)
            for kind, part in (words.groups()[::-1], words.groups()) if words else ():
                if kind in _WORDS and part in _SPLIT_WORDS:
                    place = (_SPLIT_WORDS[part], _WORDS[kind])
                    if place in self._keys:
                        raise DataError(f"{path}: {self._keys[place]!r} and {key!r} are both the {' '.join(place)}s.")
                    self._keys[place] = key
        self._with_images = [s for s in SPLITS if (s, "image") in self._keys]
        self.splits = [s for s in self._with_images if allow_unlabelled or (s, "label") in self._keys]
        if not self._with_images:
            raise DataError(f"{path}: no split found. Keys: {', '.join(self._names) or 'none'}. {_LAYOUT}")

    def has(self, split, kind):
        return (split, kind) in self._keys

    def missing(self, split, stored):
        """What to raise where the split asked for, which is read from `stored`, is not there or has no labels."""
        if stored in self._with_images:
            key = self._keys[stored, "image"]
            label_key = "_".join({"x": "y", "images": "labels"}.get(word, word) for word in key.split("_"))
            return DataError(
                f"{self._path}: images of {stored} without labels: there is no {label_key!r} beside {key!r}. Save the "
                "labels too; what needs none takes such a file as it is."
            )
        cut = "" if split == stored else f", and no {stored} split to cut one from"
        return DataError(
            f"{self._path}: no {split} split in it{cut}, only {', '.join(self._with_images)}. Ask for what is there "
            f"(split={self._with_images[0]}), or save {stored}_x (and {stored}_y, its labels) too."
        )

    def read(self, split, kind):
        return self._read_key(self._keys[split, kind])

    def read_class_names(self):
        """The names in the file; without any, "0" … as far as the labels of all splits reach."""
        if "class_names" in self._names:
            names = self._read_key("class_names")
            if names.ndim != 1 or names.dtype.kind != "U":
                raise DataError(
                    f"{self._path}: class_names is {names.dtype}{list(names.shape)}, expected a list of text."
                )
            return names.tolist()
        num_records, top = 0, -1
        for split in self.splits:
            if not self.has(split, "label"):
                continue
            labels = self.read(split, "label")
            if labels.dtype.kind in "iu" and labels.size:
                num_records, top = num_records + labels.size, max(top, int(labels.max()))
        if top > num_records:  # identifiers rather than classes; or a billion names to make up
            raise DataError(f"{self._path}: {num_records} labels reach up to {top}; save class_names with them.")
        return [str(label) for label in range(top + 1)]

    @contextlib.contextmanager
    def _open(self):
        try:
            raw = self._path.open("rb")  # not by NumPy: it leaves a file open that it cannot read
        except OSError as error:
            raise DataError(f"{self._path}: cannot be opened ({error.strerror}).") from error
        with raw:
            magic = raw.read(len(_MAGIC_ARRAY))
            if magic == _MAGIC_ARRAY:
                raise DataError(f"{self._path}: holds a single array, expected an .npz archive. {_LAYOUT}")
            if not magic.startswith(_MAGIC_ZIP):  # NumPy would take it for a pickle, and advise to load that
                found = f"it begins with {magic!r}" if magic else "it is empty"
                raise DataError(
                    f"{self._path}: no .npz archive, whatever its name: {found}. Save plain arrays by np.savez. "
                    f"{_LAYOUT}"
                )
            raw.seek(0)
            try:
                file = np.load(raw, allow_pickle=False)
            except Exception as error:  # zipfile, zlib, lzma and NumPy each raise their own on a damaged file
                raise DataError(f"{self._path}: a damaged .npz archive ({error}). Write or copy it again.") from error
            yield file

    def _read_key(self, key):
        with self._open() as file:
            try:
                array = file[key]
            except Exception as error:  # as above; a header that promises a terabyte is a MemoryError
                why = f"({error})."
                if "pickle" in str(error):  # NumPy's own advice is to allow it
                    why = "because it holds objects, which are never unpickled. Save plain arrays."
                raise DataError(f"{self._path}: array {key!r} cannot be read {why}") from error
        if not isinstance(array, np.ndarray):
            raise DataError(f"{self._path}: {key!r} is no array.")
        return array


def _check_images(where, images):
    """The images as uint8 or float32[N, H, W, C], or an error that says what is wrong with them."""
    if images.ndim not in (3, 4):
        raise DataError(f"{where}: images are {images.dtype}{list(images.shape)}, expected [N, H, W] or [N, H, W, C].")
    images = images[..., None] if images.ndim == 3 else images
    if not 1 <= images.shape[-1] <= _MAX_CHANNELS or 0 in images.shape[1:3]:
        hint = " Move the channels to the end." if images.shape[1] <= _MAX_CHANNELS else ""
        raise DataError(
            f"{where}: images are {list(images.shape)}, expected [N, H, W, C] with 1 to {_MAX_CHANNELS} channels.{hint}"
        )
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise DataError(f"{where}: images are {images.dtype}, expected uint8 on 0 to 255 or floats in [0, 1].")
    images = images.astype(np.float32)
    is_bad = ~np.isfinite(images)
    if is_bad.any():
        raise DataError(
            f"{where}: {np.count_nonzero(is_bad)} of {images.size} pixels are NaN or Inf, in "
            f"{list_some('image', is_bad.any(axis=(1, 2, 3)))}. Leave those out, or save numbers in their place."
        )
    if images.size and (images.min() < 0.0 or images.max() > 1.0):
        raise DataError(
            f"{where}: float images must lie in [0, 1], found {images.min():g} to {images.max():g}. "
            "Divide by the largest value, or save them as uint8."
        )
    return images


def _check_labels(where, labels, num_classes):
    """int32[N], each the number of a class."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels are {labels.dtype}{list(labels.shape)}, expected integers [N].")
    if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
        raise DataError(
            f"{where}: labels run from {labels.min()} to {labels.max()}, but there are {num_classes} class names "
            f"(labels 0 to {num_classes - 1}): {list_some('record', (labels < 0) | (labels >= num_classes))}. Leave "
            "those out, or number the classes from 0 and give class_names a name for each."
        )
    return labels.astype(np.int32)


def list_some(what: str, is_one: np.ndarray) -> str:
    """The first indices where bool[N] is true, and how many there are: "images 3, 7, ... (12 of 40)"."""
    found = np.flatnonzero(is_one)
    shown = ", ".join(map(str, found[:_NUM_LISTED])) + (", ..." if len(found) > _NUM_LISTED else "")
    return f"{what}{'s' if len(found) > 1 else ''} {shown} ({len(found)} of {len(is_one)})"


def cut_by_class(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool[N], who is held out: the same share of every class, at least one record of a class of two or more."""
    order = np.argsort(record_bits(seed, "validation", np.arange(len(labels)), 1)[:, 0], kind="stable")
    is_held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = max(round(fraction * len(members)), 1) if fraction > 0 else 0
        is_held[members[: min(count, len(members) - 1)]] = True
    return is_held


def _cut_by_group(path, groups, num_records, fraction, seed):
    """bool[N]: whole groups, at least one of two or more, until another would lead away from `fraction`."""
    if groups.shape != (num_records,) or groups.dtype.kind not in "iu":
        raise DataError(
            f"{path} (train): groups are {groups.dtype}{list(groups.shape)}, expected integers [{num_records}]."
        )
    names = np.unique(groups)
    order = np.argsort(record_bits(seed, "validation", names, 1)[:, 0], kind="stable")
    is_held = np.zeros(num_records, bool)
    for group in names[order][:-1]:
        is_member = groups == group
        if fraction == 0 or (is_held.any() and is_held.sum() + is_member.sum() / 2 > fraction * num_records):
            break
        is_held |= is_member
    return is_held
