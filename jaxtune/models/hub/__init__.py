"""The families of other libraries: from their config.json and their tensors to ours.

A family is one module here with two functions: `read_config(values)` gives one of our configs, or refuses by name
what it cannot do exactly; `key_table(config, values, names)` gives the table between its tensors and our tree. Where
config.json does not say all, a third, `facts(values, names)`, says what the tensors tell (see `facts`).
"""

import importlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.errors import ConfigError
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.keys import KeyTable

# model_type in config.json -> module. A module loads when a checkpoint of its family is read.
MODULES: dict[str, str] = {
    "bert": "bert",
    "camembert": "roberta",
    "clip": "clip",
    "clip_text_model": "clip",
    "clip_vision_model": "clip",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "distilbert": "distilbert",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "mt5": "t5",
    "olmo2": "olmo2",
    "opt": "opt",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "resnet": "resnet",
    "roberta": "roberta",
    "siglip": "siglip",
    "siglip_text_model": "siglip",
    "siglip_vision_model": "siglip",
    "t5": "t5",
    "vit": "vit",
    "xlm-roberta": "roberta",
}

# A timm config.json has no model_type but an "architecture", whose name begins like one of these -> module.
ARCHITECTURES: dict[str, str] = {
    r"(tv_)?(wide_)?resnet\d": "resnet",
    r"vit_|deit|eva|flexivit": "timm",
}


def is_stored_family(values: Mapping[str, Any]) -> bool:
    """Whether a config is that of a family read through a key table."""
    return _module_name(values) is not None


def read_stored_config(values: Mapping[str, Any]) -> Any:
    """Our config of a checkpoint of another library.

    Raises:
        ConfigError: an unknown family, or a field that changes the function and is not supported; names it.
    """
    return _module_of(values).read_config(values)


def with_facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The values of config.json, and what only the tensors `names` tell where the family asks them."""
    tell = getattr(_module_of(values), "facts", None)
    return dict(values) if tell is None else {**values, FACTS: tell(values, names)}


def stored_key_table(config: Any, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the tensors `names` and our tree."""
    return _module_of(values).key_table(config, values, names)


def _module_name(values):
    model_type, architecture = values.get("model_type"), values.get("architecture")
    if "model_type" not in values and isinstance(values.get("model_cfg"), Mapping):
        return "open_clip"  # its file is open_clip_config.json
    if "model_type" not in values and isinstance(architecture, str):
        return next((name for pattern, name in ARCHITECTURES.items() if re.match(pattern, architecture)), None)
    return MODULES.get(model_type) if isinstance(model_type, str) else None


def _module_of(values):
    name = _module_name(values)
    if name is None:
        raise ConfigError(
            f"unknown model_type {values.get('model_type')!r}. Families read from other libraries: "
            f"{', '.join(sorted(MODULES)) or 'none'}."
        )
    return importlib.import_module(f"jaxtune.models.hub.{name}")
