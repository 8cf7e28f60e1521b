"""OLMo 2: a Llama that norms what attention and MLP put out, and all queries and all keys of a token together."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, key_table, read_llama_like

__all__ = ["key_table", "read_config"]


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of an OLMo 2."""
    fields = Fields(values, {**DEFAULTS, "rms_norm_eps": 1e-5})
    bias = fields["attention_bias"]
    return read_llama_like(fields, placement="output", qk_norm="whole", qkv_bias=bias, out_bias=bias)
