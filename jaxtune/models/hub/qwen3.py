"""Qwen3: a Llama that norms queries and keys, head by head with one gain."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, key_table, read_llama_like
from jaxtune.models.hub.qwen2 import WINDOWS, read_late_windows

__all__ = ["key_table", "read_config"]


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Qwen3."""
    fields = Fields(values, {**DEFAULTS, **WINDOWS, "head_dim": 128})
    bias = fields["attention_bias"]
    return read_llama_like(fields, qk_norm="head", qkv_bias=bias, out_bias=bias, **read_late_windows(fields))
