"""OPT: learned positions that count real tokens, and OPT-350m: norms behind the sums, a narrower token table."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.decoder_fields import read_head
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.gpt_neox import norm_rows
from jaxtune.models.hub.llama_like import head_rows
from jaxtune.models.keys import LINEAR, KeyTable, Row

DEFAULTS = {
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
PREFIXES = ("model.decoder.", "decoder.", "")


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of an OPT."""
    fields = Fields(values, DEFAULTS)
    fields.only("layer_norm_elementwise_affine", True)
    heads, width, bias = fields["num_attention_heads"], fields["hidden_size"], fields["enable_bias"]
    is_first = fields["do_layer_norm_before"]
    table = fields["word_embed_proj_dim"] or width
    return decoder.Config(
        vocab_size=fields["vocab_size"],
        width=width,
        depth=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_width=width // heads,
        mlp_width=fields["ffn_dim"],
        activation=fields.activation("activation_function"),
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        placement="pre" if is_first else "post",
        final_norm=is_first and not fields["_remove_final_layer_norm"],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        num_positions=fields["max_position_embeddings"],
        positions_skip_padding=True,
        position_offset=2,
        embed_width=None if table == width else table,
        **read_head(fields),
    )


def key_table(config: decoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in names), PREFIXES[0])
    rows = [
        Row(f"{prefix}embed_tokens.weight", "embed/token"),
        Row(f"{prefix}embed_positions.weight", "embed/position"),
    ]
    if config.embed_width is not None:
        rows += [Row(f"{prefix}{n}.weight", f"embed/{n}/kernel", LINEAR) for n in ("project_in", "project_out")]
    if config.final_norm:
        rows += norm_rows(f"{prefix}final_layer_norm", "final_norm")
    for index in range(config.depth):
        stored, path = f"{prefix}layers.{index}", f"block_{index}"
        rows += norm_rows(f"{stored}.self_attn_layer_norm", f"{path}/norm1")
        rows += norm_rows(f"{stored}.final_layer_norm", f"{path}/norm2")
        for part, kernel, bias in _linears(config, stored, path):
            rows.append(kernel)
            rows += [bias] if getattr(config, f"{part}_bias") else []
    more, ties = head_rows(config, f"{prefix}embed_tokens.weight")
    return KeyTable((*rows, *more), ties)


def _linears(config, stored, path):
    """(which bias field, row of the kernel, row of the bias) of the six linear maps of a block."""
    dims = {"kv": config.num_kv_heads}
    heads = {"q": "kv 1 unit", "k": "kv unit", "v": "kv unit"}
    for part, axes in heads.items():
        name, leaf = f"{stored}.self_attn.{part}_proj", f"{path}/attn/{part}"
        kernel = Row(f"{name}.weight", f"{leaf}/kernel", f"(kv unit) in -> in {axes}", dims)
        yield "qkv", kernel, Row(f"{name}.bias", f"{leaf}/bias", f"(kv unit) -> {axes}", dims)
    name, leaf = f"{stored}.self_attn.out_proj", f"{path}/attn/out"
    kernel = Row(f"{name}.weight", f"{leaf}/kernel", "out (kv unit) -> kv 1 unit out", dims)
    yield "out", kernel, Row(f"{name}.bias", f"{leaf}/bias")
    for name, part in (("fc1", "up"), ("fc2", "down")):
        leaf = f"{path}/mlp/{part}"
        kernel = Row(f"{stored}.{name}.weight", f"{leaf}/kernel", LINEAR)
        yield "mlp", kernel, Row(f"{stored}.{name}.bias", f"{leaf}/bias")
