"""Sources made of other sources: several as one, a part of one, some classes, a few records of each."""

from collections.abc import Sequence

import numpy as np

from jaxtune.data.source import DataSource, check_indices
from jaxtune.errors import DataError, unknown_name

_SCAN = 1024  # records at a time when labels are read


def read_labels(source: DataSource) -> np.ndarray:
    """The label of every record: int[len(source)].

    Raises:
        DataError: the records have none.
    """
    if len(source) and "label" not in source[0]:
        raise DataError(f"{source.name} ({source.split}): the records have no labels; what is asked for needs them.")
    chunks = [np.arange(start, min(start + _SCAN, len(source))) for start in range(0, len(source), _SCAN)]
    labels = [source.__getitems__(chunk)["label"] for chunk in chunks]
    return np.concatenate(labels) if labels else np.zeros(0, np.int32)


class PartSource:
    """Some records of a source, in the given order; labels and classes stay those of the whole.

    Raises:
        DataError: no record is named.
        IndexError: one that the source does not have.
    """

    def __init__(self, source: DataSource, indices: Sequence[int], *, name: str):
        self.name, self.split, self.class_names = name, source.split, source.class_names
        self._source, self._indices = source, check_indices(source, indices)
        if not len(self._indices):
            raise DataError(f"{name} ({source.split}): no record is left of {len(source)}.")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return self._source.__getitems__(self._indices[check_indices(self, indices)])


class JoinedSource:
    """Several sources as one task: their records one after another, their classes side by side.

    Args:
        sources: Of one split and one image shape; class names must differ, `class_prefix` makes them.

    Raises:
        DataError: there are none, splits differ, or two have a class of one name.
    """

    def __init__(self, sources: Sequence[DataSource]):
        if not sources or len({source.split for source in sources}) > 1:
            raise DataError(f"joining needs sources of one split, got {[source.split for source in sources]}.")
        self.name, self.split = "+".join(source.name for source in sources), sources[0].split
        self.class_names = tuple(name for source in sources for name in source.class_names)
        if len(set(self.class_names)) < len(self.class_names):
            repeated = sorted({name for name in self.class_names if self.class_names.count(name) > 1})
            raise DataError(f"{self.name}: class {repeated[0]!r} is in several sources; give each a class_prefix.")
        self._sources = tuple(sources)
        self._starts = np.cumsum([0, *(len(source) for source in sources)])
        self._labels = np.cumsum([0, *(len(source.class_names) for source in sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        indices = check_indices(self, indices)
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        whole: dict[str, np.ndarray] = {}
        for n in np.unique(owner):
            rows = np.flatnonzero(owner == n)
            batch = dict(self._sources[n].__getitems__(indices[rows] - self._starts[n]))
            if "label" not in batch:
                raise DataError(f"{self._sources[n].name}: the records have no labels; a joined task needs them.")
            batch["label"] = (batch["label"] + self._labels[n]).astype(np.int32)
            for key, values in batch.items():
                if key not in whole:
                    whole[key] = np.empty((len(indices), *values.shape[1:]), values.dtype)
                if whole[key].shape[1:] != values.shape[1:]:
                    raise DataError(
                        f"{self.name}: {key}s of {list(whole[key].shape[1:])} and of {list(values.shape[1:])} "
                        "cannot be one task. Give all sources one size."
                    )
                whole[key][rows] = values
        return whole


def take_half(source: DataSource, half: int) -> PartSource:
    """Half 0 or 1 of the records, drawn by chance once and for all; the two have no record in common."""
    if half not in (0, 1):
        raise DataError(f"half is {half!r}; it must be 0 or 1.")
    order = np.random.RandomState(0).permutation(len(source))  # a stream that NumPy never changes
    middle = (len(source) + 1) // 2
    chosen = np.sort(order[:middle] if half == 0 else order[middle:])
    return PartSource(source, chosen, name=f"{source.name}+half({half})")


def take_classes(source: DataSource, classes: Sequence[str], *, name: str) -> PartSource:
    """The records of some classes only, in their old order; `name` is what reports call it.

    Labels and `class_names` stay those of the whole, so one classifier serves both.

    Raises:
        UnknownNameError: a class that the source does not have.
        DataError: no record is of these classes.
    """
    for wanted in classes:
        if wanted not in source.class_names:
            raise unknown_name(f"class of {source.name}", wanted, source.class_names)
    kept = np.flatnonzero(np.isin(read_labels(source), [source.class_names.index(wanted) for wanted in classes]))
    if not len(kept):
        raise DataError(f"{source.name} ({source.split}): no record is of the classes {list(classes)}.")
    return PartSource(source, kept, name=name)


def take_few(source: DataSource, num_per_class: int, *, seed: int = 0) -> PartSource:
    """At most `num_per_class` records of every class, drawn by chance: a few-shot task."""
    if num_per_class < 1:
        raise DataError(f"num_per_class is {num_per_class}; it must be at least 1.")
    labels = read_labels(source)
    order = np.random.RandomState(seed).permutation(len(source))
    chosen = [order[labels[order] == label][:num_per_class] for label in np.unique(labels)]
    return PartSource(source, np.sort(np.concatenate(chosen)), name=f"{source.name}+few({num_per_class})")


def take_sample(source: DataSource, num_records: int, *, seed: int = 0) -> DataSource:
    """At most `num_records` records, drawn by chance, so that a part of a sorted source has all classes."""
    if len(source) <= num_records:
        return source
    order = np.random.RandomState(seed).permutation(len(source))
    return PartSource(source, np.sort(order[:num_records]), name=f"{source.name}+sample({num_records})")
