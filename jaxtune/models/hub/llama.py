"""Llama 1 to 3, and what is stored as one (model_type "llama"): Vicuna, Yi, SmolLM, TinyLlama, DeepSeek-Coder."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, key_table, read_llama_like

__all__ = ["key_table", "read_config"]


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Llama."""
    fields = Fields(values, DEFAULTS)
    bias = fields["attention_bias"]
    return read_llama_like(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields["mlp_bias"])
