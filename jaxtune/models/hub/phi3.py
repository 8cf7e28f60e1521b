"""Phi-3 and Phi-4: a Llama that stores queries, keys and values as one tensor, and gate and up as another."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub import llama_like
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, read_llama_like
from jaxtune.models.keys import LINEAR, KeyTable, Row


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Phi-3."""
    fields = Fields(values, {**DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": None})
    return read_llama_like(fields, window=fields["sliding_window"])


def key_table(config: decoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    return llama_like.key_table(config, values, names, attention=_attention_rows, mlp=_mlp_rows)


def _attention_rows(config, index, stored):
    path, stored = f"block_{index}/attn", f"{stored}.self_attn"
    dims = {"kv": config.num_kv_heads, "query": config.num_queries}
    one = config.num_kv_heads * config.head_width
    keys = "(kv unit) in -> in kv unit"
    return [
        Row(
            f"{stored}.qkv_proj.weight",
            tuple(f"{path}/{part}/kernel" for part in "qkv"),
            ("(kv query unit) in -> in kv query unit", keys, keys),
            dims,
            sizes=(one * config.num_queries, one, one),
        ),
        Row(f"{stored}.o_proj.weight", f"{path}/out/kernel", "out (kv query unit) -> kv query unit out", dims),
    ]


def _mlp_rows(config, index, stored):
    path = f"block_{index}/mlp"
    halves = (config.mlp_width, config.mlp_width)
    return [
        Row(f"{stored}.mlp.gate_up_proj.weight", (f"{path}/gate/kernel", f"{path}/up/kernel"), LINEAR, sizes=halves),
        Row(f"{stored}.mlp.down_proj.weight", f"{path}/down/kernel", LINEAR),
    ]
