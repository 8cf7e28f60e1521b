"""Granite 3: a Llama with four multipliers."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, key_table, read_llama_like

__all__ = ["key_table", "read_config"]

MULTIPLIERS = {
    "embedding_multiplier": "embed_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_divisor",
}


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Granite."""
    fields = Fields(values, {**DEFAULTS, **dict.fromkeys(MULTIPLIERS, 1.0)})
    multipliers = {ours: fields[theirs] for theirs, ours in MULTIPLIERS.items()}
    bias = fields["attention_bias"]
    return read_llama_like(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields["mlp_bias"], **multipliers)
