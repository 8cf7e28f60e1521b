"""Gemma 2: norms before and behind each part, gains that count from 1, soft caps, windows in every other block."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.decoder_fields import read_windows
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, key_table, read_llama_like

__all__ = ["key_table", "read_config", "read_gemma"]

OWN = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Gemma 2."""
    fields = Fields(values, {**DEFAULTS, **OWN, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})
    every_other = [index % 2 == 0 for index in range(fields["num_hidden_layers"])]
    return read_gemma(fields, attention_softcap=fields["attn_logit_softcapping"], **read_windows(fields, every_other))


def read_gemma(fields: Fields, **choices: Any) -> decoder.Config:
    """What Gemma 2 and 3 share; `choices` as in `read_llama_like`."""
    bias = fields["attention_bias"]
    return read_llama_like(
        fields,
        activation=fields.activation("hidden_activation"),
        norm="rms_plus_one",
        placement="sandwich",
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=fields["query_pre_attn_scalar"] ** -0.5,
        logit_softcap=fields["final_logit_softcapping"],
        embed_scale=fields["hidden_size"] ** 0.5,
        **choices,
    )
