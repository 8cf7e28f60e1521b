"""Mixtral: a Mistral with a mixture of experts in every block; a chosen expert's weight is its share of the chosen."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.experts import Experts
from jaxtune.models.hub import llama_like
from jaxtune.models.hub.decoder_fields import read_rotary
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import DEFAULTS, read_llama_like
from jaxtune.models.hub.mixture import count_experts, expert_rows
from jaxtune.models.keys import KeyTable

MIXTURE = {"num_experts_per_tok": 2, "num_local_experts": 8}
OWN = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None}
PARTS = {"gate": "w1", "up": "w3", "down": "w2"}


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Mixtral."""
    fields = Fields(values, {**DEFAULTS, **OWN, **MIXTURE})
    # "router_jitter_noise" is drawn in training alone.
    experts = Experts(
        num_experts=count_experts(fields),
        num_chosen=fields["num_experts_per_tok"],
        hidden=fields["intermediate_size"],
    )
    rotary = read_rotary(fields, theta=1e6)
    return read_llama_like(fields, window=fields["sliding_window"], experts=experts, rotary=rotary)


def key_table(config: decoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree; experts one by one ("block_sparse_moe") or all in one ("mlp")."""
    return llama_like.key_table(config, values, names, mlp=partial(_mlp_rows, names=names))


def _mlp_rows(config, index, stored, *, names):
    is_old = f"{stored}.block_sparse_moe.gate.weight" in names
    return expert_rows(config, index, f"{stored}.{'block_sparse_moe' if is_old else 'mlp'}", names, PARTS)
