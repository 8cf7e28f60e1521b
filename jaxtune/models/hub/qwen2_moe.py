"""Qwen1.5-MoE and Qwen2-MoE: a Qwen2 with a mixture of experts and one shared expert behind a gate of its own."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub import mixture
from jaxtune.models.hub.decoder_fields import read_windows
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, read_llama_like
from jaxtune.models.hub.qwen3_moe import key_table

__all__ = ["key_table", "read_config"]

OWN = {
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Qwen2-MoE."""
    fields = Fields(values, {**DEFAULTS, **mixture.DEFAULTS, **OWN})
    experts = mixture.read_mixture(fields, shared_hidden=fields["shared_expert_intermediate_size"])
    return read_llama_like(fields, qkv_bias=fields["qkv_bias"], **_read_windows(fields), **experts)


def _read_windows(fields):
    kinds = fields.get("layer_types")
    if not fields["use_sliding_window"] and "sliding_attention" not in (kinds or ()):
        return {}
    if not fields["use_sliding_window"] or kinds is None:
        raise fields.error(
            f'"use_sliding_window" is {fields["use_sliding_window"]!r} and "layer_types" {kinds!r} in config.json; '
            "releases differ in which blocks have the window then. Name every block in layer_types."
        )
    return read_windows(fields, [])
