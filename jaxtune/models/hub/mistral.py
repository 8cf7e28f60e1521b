"""Mistral: a Llama whose every block may have a window."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, key_table, read_llama_like

__all__ = ["key_table", "read_config"]


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Mistral."""
    fields = Fields(values, {**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096})
    return read_llama_like(fields, window=fields["sliding_window"])
