"""Which config a checkpoint has, where several places may say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.checkpoint import files
from jaxtune.errors import CheckpointError


def settle_config(path: Path, configs: Mapping[str, bytes], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The one config among those found and the one given.

    Args:
        path: The checkpoint, for messages.
        configs: Where a config was found -> its text.
        given: What the caller says; `{}` stands for a model of unknown family.

    Raises:
        CheckpointError: there is none, one does not parse, or two differ.
    """
    parsed = {where: files.parse_object(text, where, has_constants=True) for where, text in configs.items()}
    if given:
        parsed["the argument config"] = dict(given)
    if not parsed and given is None:
        raise CheckpointError(
            f"{path}: no config: there is no config.json, and none inside the file. "
            f"Put config.json beside the weights, or pass config= to jaxtune.load (--config on the command line)."
        )
    (first, config), *others = parsed.items() if parsed else [("", {})]
    for where, other in others:
        if other != config:
            odd = sorted(key for key in config.keys() | other.keys() if config.get(key) != other.get(key))
            raise CheckpointError(
                f"{path}: two configs that differ in {', '.join(odd)}: {first} and {where}. Keep one."
            )
    return config
