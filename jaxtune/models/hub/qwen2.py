"""Qwen 1.5, 2 and 2.5: a Llama with biases on queries, keys and values; the later blocks may have a window."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.decoder_fields import read_windows
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, key_table, read_llama_like

__all__ = ["key_table", "read_config", "read_late_windows"]

WINDOWS = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Qwen2."""
    fields = Fields(values, {**DEFAULTS, **WINDOWS})
    return read_llama_like(fields, qkv_bias=True, **read_late_windows(fields))


def read_late_windows(fields: Fields) -> dict[str, Any]:
    """`window` and `windowed`: by "layer_types", or of the blocks from "max_window_layers" on.

    Raises:
        ConfigError: "layer_types" names blocks with a window, and "use_sliding_window" is false.
    """
    if fields["use_sliding_window"] and fields["sliding_window"] is not None:
        return read_windows(fields, [i >= fields["max_window_layers"] for i in range(fields["num_hidden_layers"])])
    if "sliding_attention" in (fields.get("layer_types") or ()):
        raise fields.error(
            '"layer_types" in config.json names blocks with a window, "use_sliding_window" and "sliding_window" do not.'
        )
    return {}
