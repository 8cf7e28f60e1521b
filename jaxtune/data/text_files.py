"""Files of texts: one JSON object a line, checked line by line."""

import functools
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.errors import DataError, unknown_name

SUFFIXES = (".jsonl", ".jsonl.gz")
MAX_LINE_BYTES = 2**26  # a packed file may hold a line that no memory does
_SPLIT_WORDS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_ADVICE = (
    'Each line is one JSON object {"task", "split", "text", "label", "label_name"}; '
    "label and label_name may be missing from all texts of a task, task and label_name from all of the file."
)


@dataclass(frozen=True)
class TextRecord:
    """One line. `label` is None where the line has none; `label_name` is then None too."""

    task: str
    split: str
    text: str
    label: int | None
    label_name: str | None


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: vocabularies learnt on it are kept beside it
class TextFile:
    """A whole file.

    Attributes:
        path: As given.
        records: Line by line.
        classes: Task -> name of each label; empty where the task has no labels.
    """

    path: Path
    records: tuple[TextRecord, ...]
    classes: dict[str, tuple[str, ...]]

    def of(self, split: str, task: str | None = None) -> list[TextRecord]:
        """The records of a split, of one task or of all."""
        return [record for record in self.records if record.split == split and task in (None, record.task)]

    def find_task(self, task: str | None) -> str:
        """The task asked for, or the only one.

        Raises:
            UnknownNameError: the file does not have it.
            DataError: none is named and the file has several.
        """
        if task is None and len(self.classes) == 1:
            return next(iter(self.classes))
        if task is None:
            raise DataError(f"{self.path}: holds {len(self.classes)} tasks, choose one: task={'|'.join(self.classes)}.")
        if task not in self.classes:
            raise unknown_name(f"task of {self.path}", task, self.classes)
        return task


def stem_of(path: Path) -> str:
    """The name of a file without its endings."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def read_text_file(path: str | Path) -> TextFile:
    """Reads `.jsonl` or `.jsonl.gz`; what was read is kept while the file stays as it is.

    Raises:
        DataError: the file is missing, damaged or empty, or a line is no such record; names file and line.
    """
    path = Path(path)
    try:
        status = path.stat()
        return _read(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error}).") from error


@functools.lru_cache(maxsize=8)  # the tasks and splits of one file are opened one after another
def _read(path, size, changed):
    del size, changed
    records, number = [], 0
    with path.open("rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        while True:
            number += 1
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{path}, line {number}: the packed file is damaged ({error}).") from error
            if not line:
                break
            if line.strip():
                records.append(_parse(path, number, line))
    if not records:
        raise DataError(f"{path}: there is no line in it. {_ADVICE}")
    return TextFile(path, tuple(records), _classes(path, records))


def _parse(path, number, line):
    """The record of one line, or an error that says where and what."""
    where = f"{path}, line {number}"
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes. Cut the text into several lines.")
    try:
        found = json.loads(line.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object in UTF-8 ({error}). {_ADVICE}") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: found {type(found).__name__}, expected an object. {_ADVICE}")
    task, split = found.get("task", stem_of(path)), found.get("split")
    text, label, name = found.get("text"), found.get("label"), found.get("label_name")
    for field, value in (("task", task), ("split", split), ("text", text), ("label_name", name)):
        if not isinstance(value, str) and not (field == "label_name" and value is None):
            raise DataError(f"{where}: {field!r} is {_show(value)}, expected text. {_ADVICE}")
    if split not in _SPLIT_WORDS:
        raise DataError(f"{where}: {unknown_name('split', split, _SPLIT_WORDS)}")
    if label is not None and (type(label) is not int or label < 0):
        raise DataError(f"{where}: 'label' is {_show(label)}, expected an integer from 0 up.")
    if label is None and name is not None:
        raise DataError(f"{where}: there is a label_name, {name!r}, and no label.")
    return TextRecord(task, _SPLIT_WORDS[split], text, label, name)


def _classes(path: Path, records: Sequence[TextRecord]) -> dict[str, tuple[str, ...]]:
    """Task -> name of each label, one and the same in all splits."""
    counts = Counter(record.task for record in records)
    labelled = Counter(record.task for record in records if record.label is not None)
    names: dict[str, dict[int, str]] = {task: {} for task in sorted(counts)}
    for record in records:
        if record.label is None:
            if labelled[record.task]:
                raise DataError(
                    f"{path}: {counts[record.task] - labelled[record.task]} of the {counts[record.task]} texts of task "
                    f"{record.task!r} have no label. Label all or none."
                )
            continue
        name = str(record.label) if record.label_name is None else record.label_name
        known = names[record.task].setdefault(record.label, name)
        if known != name:
            raise DataError(f"{path}: label {record.label} of task {record.task!r} is {known!r} and also {name!r}.")
    return {task: _in_order(path, task, found, labelled[task]) for task, found in names.items()}


def _in_order(path, task, names, num_records):
    top = max(names, default=-1)
    if top > num_records:  # identifiers rather than classes
        raise DataError(
            f"{path}: the {num_records} labels of task {task!r} reach up to {top}; number the classes from 0."
        )
    ordered = tuple(names.get(label, str(label)) for label in range(top + 1))
    repeated = [name for name, count in Counter(ordered).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: two labels of task {task!r} are called {repeated[0]!r}; class names must differ.")
    return ordered


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _show(value):
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
