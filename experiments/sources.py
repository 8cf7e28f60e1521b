"""The data that a config names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxtune.data import SPLITS, DataSource, JoinedSource, open_source, shift_source
from jaxtune.errors import ConfigError

FIELDS = {
    "name",  # of `data.open_source`
    "options",  # of the source
    "eval_options",  # what validation and test have in the place of some of them
    "classes",  # names of the classes to keep; none keeps all
    "shifts",  # ({"name": ..., "options": {...}}, ...) of `data.shift_source`, applied in turn
}


def open_task(data: Mapping[str, Any], split: str, *, data_dir: str | None = None) -> DataSource:
    """One split of the source that a config names, with its classes and shifts.

    Args:
        data: "name", and any other of `FIELDS`.
        split: Which one.
        data_dir: Put before a name that is a file's, and before the files of a vocabulary; None leaves them.

    Raises:
        ConfigError: an unknown field, a shift that is not a dict of "name" and, if it has any, "options", or a
            `data_dir` that is asked for and empty.
        UnknownNameError, DataError: the source, a shift or an option does not exist or does not fit.
    """
    data = _plain(data)
    if "name" not in data or set(data) - FIELDS:
        raise ConfigError(f"data {data!r}: fields are {', '.join(sorted(FIELDS))}, and name is needed.")
    name = data["name"]
    if data_dir is not None and name.endswith((".npz", ".jsonl", ".jsonl.gz")):
        if not data_dir:
            raise ConfigError(
                f"config.data_dir is not set, and {name} is read from there. Give --config.data_dir=DIR, a folder "
                "with the files that the config's header lists."
            )
        name = str(Path(data_dir) / name)
    options = _plain(data.get("options", {})) | (_plain(data.get("eval_options", {})) if split != "train" else {})
    if data_dir is not None and "vocabulary" in options:
        options["vocabulary"] = [str(Path(data_dir) / file) for file in options["vocabulary"]]
    source = open_source(name, split, **options)
    if data.get("classes"):
        source = shift_source(source, "label_subset", classes=tuple(data["classes"]))
    for shift in data.get("shifts", ()):
        if (
            not isinstance(shift, (Mapping, ml_collections.ConfigDict))
            or "name" not in shift
            or set(shift) - {"name", "options"}
        ):
            raise ConfigError(
                f'the shifts of {name} hold {shift!r}; each shift is a dict {{"name": ..., "options": {{...}}}}.'
            )
        source = shift_source(source, shift["name"], **_plain(shift.get("options", {})))
    return source


def open_splits(data: Mapping[str, Any]) -> dict[str, DataSource]:
    """Every split of what `open_task` opens."""
    return {split: open_task(data, split) for split in SPLITS}


def open_joined(sources: Sequence[Mapping[str, Any]], split: str, *, data_dir: str | None = None) -> DataSource:
    """Several sources as one task."""
    return JoinedSource([open_task(data, split, data_dir=data_dir) for data in sources])


def _plain(values):
    return values.to_dict() if isinstance(values, ml_collections.ConfigDict) else dict(values)
