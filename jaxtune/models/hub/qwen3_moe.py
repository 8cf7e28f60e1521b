"""Qwen3-MoE: a Qwen3 with a mixture of experts in the blocks that are not named as dense."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub import llama_like, mixture
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, read_llama_like
from jaxtune.models.keys import KeyTable

OWN = {"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 4096}


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Qwen3-MoE."""
    fields = Fields(values, {**DEFAULTS, **OWN, **mixture.DEFAULTS})
    bias = fields["attention_bias"]
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    choices = {"qk_norm": "head", "qkv_bias": bias, "out_bias": bias, "window": window}
    return read_llama_like(fields, **choices, **mixture.read_mixture(fields))


def key_table(config: decoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree; experts one by one or all in one."""
    return llama_like.key_table(config, values, names, mlp=partial(mixture.sparse_or_dense_rows, names=names))
