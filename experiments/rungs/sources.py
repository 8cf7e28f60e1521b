"""The data of the ladder, from its config."""

from pathlib import Path
from typing import Any

from jaxtune.data import DataSource, JoinedSource, open_source, shift_source
from jaxtune.errors import ConfigError

FIELDS = {"name", "options", "eval_options", "classes", "shifts"}


def open_task(config: Any, data: Any, split: str) -> DataSource:
    """One source with its classes and shifts.

    Args:
        config: With `data_dir`.
        data: "name" of `data.open_source`, and if wanted "options", "eval_options" (what validation and test have in
            the place of some), "classes" to keep, "shifts" to apply: see `experiments.fitting.FIELDS`.
        split: Which one.

    Raises:
        ConfigError: an unknown field, or an .npz and no `data_dir`.
        DataError, UnknownNameError: as the source and the shifts.
    """
    data = data.to_dict() if hasattr(data, "to_dict") else dict(data)
    if "name" not in data or set(data) - FIELDS:
        raise ConfigError(f"data {data!r}: fields are {', '.join(sorted(FIELDS))}, and name is needed.")
    name = data["name"]
    if name.endswith(".npz"):
        if not config.data_dir:
            raise ConfigError(
                f"config.data_dir is not set, and {name} is read from there. Give --config.data_dir=DIR, a folder "
                "with the .npz files that the config's header lists."
            )
        name = str(Path(config.data_dir) / name)
    options = dict(data.get("options", {})) | (dict(data.get("eval_options", {})) if split != "train" else {})
    source = open_source(name, split, **options)
    if data.get("classes"):
        source = shift_source(source, "label_subset", classes=tuple(data["classes"]))
    for shift in data.get("shifts", ()):
        source = shift_source(source, shift["name"], **dict(shift.get("options", {})))
    return source


def open_joined(config: Any, sources: Any, split: str) -> DataSource:
    """Several sources as one task."""
    return JoinedSource([open_task(config, data, split) for data in sources])
