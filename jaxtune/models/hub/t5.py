"""T5, T5 v1.1, FLAN-T5 and mT5: what their config.json means, and their tensors."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import t5
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import ACTIVATIONS, Fields
from jaxtune.models.keys import LINEAR, KeyTable, Row

DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}
# Where mT5 says by leaving a field out what T5 does not.
OF_MT5 = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
CLASSES = {
    "ForConditionalGeneration": "tokens",
    "T5WithLMHeadModel": "tokens",
    "T5EncoderModel": "encoder",
    "T5Model": "none",
}
HEAD = "lm_head.weight"
# The one table of tokens, under every name that it is stored by.
TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Stored by the first releases of T5 1.0 and read by none since.
IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What only the tensors tell: whether the head is stored."""
    del values
    return {"head": HEAD in names}


def read_config(values: Mapping[str, Any]) -> t5.Config:
    """The T5 of a config.json.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    is_mt5 = values.get("model_type") == "mt5"
    # The class says whether there is a decoder; this field only agrees.
    values = {name: value for name, value in values.items() if name != "is_encoder_decoder"}
    fields = Fields(values, {**DEFAULTS, **OF_MT5} if is_mt5 else DEFAULTS)
    fields.only("is_decoder", None, False)
    kind = fields.head(CLASSES)
    depth = fields["num_layers"]
    return t5.Config(
        vocab_size=fields["vocab_size"],
        width=fields["d_model"],
        depth=depth,
        decoder_depth=None if kind == "encoder" else fields["num_decoder_layers"] or depth,
        num_heads=fields["num_heads"],
        head_width=fields["d_kv"],
        mlp_width=fields["d_ff"],
        num_buckets=fields["relative_attention_num_buckets"],
        max_distance=fields["relative_attention_max_distance"],
        norm_eps=fields["layer_norm_epsilon"],
        **_read_mlp(fields),
        **(_read_head(fields, is_mt5) if kind == "tokens" else {"head": "none"}),
    )


def key_table(config: t5.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    table = next((name for name in TABLES if name in names), TABLES[0])
    rows = [Row(table, "embed/token")]
    for stack, depth in config.stacks.items():
        first = f"{stack}.block.0.layer.0.SelfAttention"
        rows.append(Row(f"{first}.relative_attention_bias.weight", f"{stack}/distance"))
        for index in range(depth):
            rows += _block_rows(config, stack, index)
        rows.append(Row(f"{stack}.final_layer_norm.weight", f"{stack}/final_norm/scale"))
    ties = [name for name in TABLES if name != table]
    if config.head == "tokens" and not config.tied:
        rows.append(Row(HEAD, "head/kernel", LINEAR))
    elif config.head == "tokens":
        ties.append(HEAD)
    return KeyTable(tuple(rows), dict.fromkeys(ties, table), IGNORED)


def _block_rows(config, stack, index):
    path, stored = f"{stack}/block_{index}", f"{stack}.block.{index}.layer"
    rows = _attention_rows(config, f"{stored}.0.SelfAttention", f"{path}/attn")
    rows.append(Row(f"{stored}.0.layer_norm.weight", f"{path}/norm1/scale"))
    last = 1
    if stack == "decoder":
        last = 2
        rows += _attention_rows(config, f"{stored}.1.EncDecAttention", f"{path}/cross")
        rows.append(Row(f"{stored}.1.layer_norm.weight", f"{path}/cross_norm/scale"))
    parts = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
    for ours, theirs in parts.items():
        rows.append(Row(f"{stored}.{last}.DenseReluDense.{theirs}.weight", f"{path}/mlp/{ours}/kernel", LINEAR))
    return [*rows, Row(f"{stored}.{last}.layer_norm.weight", f"{path}/norm2/scale")]


def _attention_rows(config, stored, path):
    dims = {"head": config.num_heads}
    rows = [
        Row(f"{stored}.{name}.weight", f"{path}/{name}/kernel", "(head unit) in -> in head unit", dims)
        for name in "qkv"
    ]
    return [*rows, Row(f"{stored}.o.weight", f"{path}/out/kernel", "out (head unit) -> head unit out", dims)]


def _read_mlp(fields):
    """From "gated-gelu" or "relu"; releases that store its two halves as well must agree with themselves."""
    name = fields["feed_forward_proj"]
    gate, act = name.split("-") if name.count("-") == 1 else ("", name)
    act = "gelu_new" if name == "gated-gelu" else act  # not the exact one
    if gate not in ("", "gated") or act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise fields.error(
            f'"feed_forward_proj" is {name!r} in config.json; supported are {known}, each alone or behind "gated-".'
        )
    fields.only("is_gated_act", None, bool(gate))
    fields.only("dense_act_fn", None, act)
    return {"activation": ACTIVATIONS[act], "gated": bool(gate)}


def _read_head(fields, is_mt5):
    """The head of T5 1.0 is the table of tokens, read at `width ** -0.5`; later ones have a kernel of their own.

    "tie_word_embeddings": false once said both. New releases of transformers write true for all and the scale apart.
    """
    scaled = fields.get("scale_decoder_outputs")
    if scaled is None:
        scaled = fields["tie_word_embeddings"] is not False
    scaled = bool(scaled) and not is_mt5
    is_stored = fields.get(FACTS, {}).get("head", fields["tie_word_embeddings"] is False)
    return {"head": "tokens", "scaled": scaled, "tied": scaled or not is_stored}
