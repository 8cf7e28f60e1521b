"""What several commands do with their arguments."""

import ast
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune import checkpoint
from jaxtune.adapters import Adapter
from jaxtune.checkpoint.files import parse_object, read_small
from jaxtune.checkpoint.manifest import hash_file, list_files
from jaxtune.errors import ConfigError, OutputError, unknown_name
from jaxtune.loading import load, network_of


def read_config(path: str | None) -> dict[str, Any] | None:
    """The config.json that `--config` names.

    Raises:
        CheckpointError: missing, unreadable or not a JSON object.
    """
    return None if path is None else parse_object(read_small(Path(path)), path)


def load_models(paths: Mapping[str, str], config: dict[str, Any] | None) -> dict[str, checkpoint.Checkpoint]:
    """Loads every checkpoint and checks that its family is known and its tree is the config's.

    Raises:
        CheckpointError, TreeMismatchError: as `loading.load`.
        ConfigError: the family is unknown or a field makes no sense; names the checkpoint.
    """
    models = {}
    for role, path in paths.items():
        models[role] = load(path, config=config)
        try:
            network_of(models[role])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return models


def refuse_output(out: str | None, overwrite: bool, inputs: Sequence[str]) -> Path:
    """The output folder, refused before any work where it could not be published."""
    if out is None:
        raise OutputError("--out DIR is missing: it says where the result goes.")
    return checkpoint.refuse_existing(out, overwrite=overwrite, inputs=inputs)


def parse_options(pairs: Sequence[str], known: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`NAME=VALUE` pairs as options, each of the type of its default; where that is None, as Python reads the value.

    Raises:
        UnknownNameError: no such option; lists the known ones.
        ConfigError: no "=", or a value of another type.
    """
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"option {pair!r}: write it as NAME=VALUE.")
        if name not in known:
            raise unknown_name(f"option of {what}", name, known or ["(it takes none)"])
        options[name] = _convert(name, text, known[name])
    return options


def _convert(name, text, default):
    if isinstance(default, str):
        return text
    try:
        value = json.loads(text.lower()) if isinstance(default, bool) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what literal_eval may raise
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if default is not inspect.Parameter.empty and default is not None and type(value) is not type(default):
        raise ConfigError(f"option {name}={text}: expected a {type(default).__name__}, like the default {default!r}.")
    return value


def describe_inputs(models: Mapping[str, checkpoint.Checkpoint], adapter: Adapter | None = None) -> dict[str, Any]:
    """Path, format and hashes of every input, for the report; of an adapter in the place of the fine-tune."""
    own = {role: model for role, model in models.items() if adapter is None or role != "finetuned"}
    inputs = {role: checkpoint.describe_checkpoint(model) for role, model in own.items()}
    if adapter is not None:
        names = [name for name in list_files(adapter.path) if name not in adapter.left_out]
        hashes = {name: hash_file(adapter.path / name) for name in names}
        inputs["finetuned"] = {"path": str(adapter.path), "format": "peft", "sha256": hashes}
    return {role: inputs[role] for role in models}
