"""What Llama and its descendants share: fields of config.json and names of tensors. A member is a few lines more.

A member names what it changes: `read_llama_like(fields, norm="rms_plus_one")`, and which rows read its attention and
its MLP, if those are stored otherwise.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.decoder_fields import read_head, read_rotary
from jaxtune.models.hub.fields import Fields
from jaxtune.models.keys import LINEAR, KeyTable, Row

# What a config.json of Llama says by leaving a field out; a member passes its own where it differs.
DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
# Stored by older releases beside the weights, computed by all.
IGNORED = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",)

# Our norms and what they are called, by placement.
NORMS = {
    "pre": {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    "output": {"post_norm1": "post_attention_layernorm", "post_norm2": "post_feedforward_layernorm"},
    "sandwich": {
        "norm1": "input_layernorm",
        "post_norm1": "post_attention_layernorm",
        "norm2": "pre_feedforward_layernorm",
        "post_norm2": "post_feedforward_layernorm",
    },
}
Rows = Callable[[decoder.Config, int, str], list[Row]]


def read_llama_like(fields: Fields, **choices: Any) -> decoder.Config:
    """A config from the fields that all members have.

    Args:
        fields: Of the config.json, with the family's defaults.
        **choices: Fields of `decoder.Config` in which the member differs.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    settings = {
        "vocab_size": fields["vocab_size"],
        "width": width,
        "depth": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": fields["num_key_value_heads"] or heads,
        "head_width": fields["head_dim"] or width // heads,
        "mlp_width": fields["intermediate_size"],
        "norm_eps": fields["rms_norm_eps"],
        **read_head(fields),
    }
    if "activation" not in choices:
        settings["activation"] = fields.activation("hidden_act")
    if "rotary" not in choices:
        settings["rotary"] = read_rotary(fields)
    return decoder.Config(**{**settings, **choices})


def attention_rows(config: decoder.Config, index: int, stored: str) -> list[Row]:
    """Four projections apart, and the gains of queries and keys if there are any."""
    path, stored = f"block_{index}/attn", f"{stored}.self_attn"
    dims = {"kv": config.num_kv_heads, "query": config.num_queries}
    rows = [
        Row(f"{stored}.q_proj.weight", f"{path}/q/kernel", "(kv query unit) in -> in kv query unit", dims),
        Row(f"{stored}.k_proj.weight", f"{path}/k/kernel", "(kv unit) in -> in kv unit", dims),
        Row(f"{stored}.v_proj.weight", f"{path}/v/kernel", "(kv unit) in -> in kv unit", dims),
        Row(f"{stored}.o_proj.weight", f"{path}/out/kernel", "out (kv query unit) -> kv query unit out", dims),
    ]
    if config.qkv_bias:
        rows += [
            Row(f"{stored}.q_proj.bias", f"{path}/q/bias", "(kv query unit) -> kv query unit", dims),
            Row(f"{stored}.k_proj.bias", f"{path}/k/bias", "(kv unit) -> kv unit", dims),
            Row(f"{stored}.v_proj.bias", f"{path}/v/bias", "(kv unit) -> kv unit", dims),
        ]
    if config.out_bias:
        rows.append(Row(f"{stored}.o_proj.bias", f"{path}/out/bias"))
    if config.qk_norm != "none":
        patterns = {"q": "(kv query unit) -> kv query unit", "k": "(kv unit) -> kv unit"}
        rows += [
            Row(f"{stored}.{n}_norm.weight", f"{path}/{n}_norm/scale", p if config.qk_norm == "whole" else "", dims)
            for n, p in patterns.items()
        ]
    return rows


def mlp_rows(config: decoder.Config, index: int, stored: str) -> list[Row]:
    """Gate, up and down apart."""
    path, rows = f"block_{index}/mlp", []
    for part in ("gate", "up", "down"):
        rows.append(Row(f"{stored}.mlp.{part}_proj.weight", f"{path}/{part}/kernel", LINEAR))
        if config.mlp_bias:
            rows.append(Row(f"{stored}.mlp.{part}_proj.bias", f"{path}/{part}/bias"))
    return rows


def key_table(
    config: decoder.Config,
    values: Mapping[str, Any],
    names: Collection[str],
    *,
    attention: Rows = attention_rows,
    mlp: Rows = mlp_rows,
) -> KeyTable:
    """Between the stored tensors and our tree.

    Args:
        config: From `read_config`.
        values: The config.json; not needed.
        names: Of the stored tensors: with "model." in front, unless the network was saved without a head.
        attention, mlp: (config, index, stored name of the block) -> rows of these two.
    """
    del values
    prefix = "" if "embed_tokens.weight" in names else "model."
    rows = [Row(f"{prefix}embed_tokens.weight", "embed/token"), Row(f"{prefix}norm.weight", "final_norm/scale")]
    for index in range(config.depth):
        stored = f"{prefix}layers.{index}"
        for ours, theirs in NORMS[config.placement].items():
            rows.append(Row(f"{stored}.{theirs}.weight", f"block_{index}/{ours}/scale"))
        rows += [*attention(config, index, stored), *mlp(config, index, stored)]
    head, ties = head_rows(config, f"{prefix}embed_tokens.weight")
    return KeyTable((*rows, *head), ties, IGNORED)


def head_rows(config: decoder.Config, table: str, *, head: str = "lm_head.weight") -> tuple[list[Row], dict[str, str]]:
    """(rows, ties) of the head.

    Args:
        config: Says which head there is.
        table: Stored name of the token table.
        head: Stored name of the head over tokens. A tied one may be stored as well; whether or not it is, the tie is
            named, since an adapter can take the two apart.
    """
    if config.head == "last":
        return [Row("score.weight", "head/kernel", LINEAR)], {}
    if config.head == "tokens" and not config.tied:
        return [Row(head, "head/kernel", LINEAR)], {}
    return [], {head: table} if config.tied else {}
