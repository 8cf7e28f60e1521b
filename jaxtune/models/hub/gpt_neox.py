"""GPT-NeoX and Pythia: attention and MLP side by side, a part of every head turns, heads stored q, k, v in turn."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.decoder_fields import read_head, read_rotary
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import head_rows
from jaxtune.models.keys import LINEAR, KeyTable, Row

DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000.0,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
IGNORED = (
    r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    r"(gpt_neox\.)?rotary_emb\.inv_freq",
)


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a NeoX."""
    fields = Fields(values, DEFAULTS)
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    bias = fields["attention_bias"]
    return decoder.Config(
        vocab_size=fields["vocab_size"],
        width=width,
        depth=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_width=width // heads,
        mlp_width=fields["intermediate_size"],
        activation=fields.activation("hidden_act"),
        gated=False,
        norm="layer",
        norm_eps=fields["layer_norm_eps"],
        placement="parallel" if fields["use_parallel_residual"] else "pre",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        rotary=read_rotary(fields, theta=fields["rotary_emb_base"], fraction=fields["rotary_pct"]),
        **read_head(fields),
    )


def key_table(config: decoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    prefix = "" if "embed_in.weight" in names else "gpt_neox."
    rows = [Row(f"{prefix}embed_in.weight", "embed/token"), *norm_rows(f"{prefix}final_layer_norm", "final_norm")]
    for index in range(config.depth):
        stored, path = f"{prefix}layers.{index}", f"block_{index}"
        rows += norm_rows(f"{stored}.input_layernorm", f"{path}/norm1")
        rows += norm_rows(f"{stored}.post_attention_layernorm", f"{path}/norm2")
        rows += _attention_rows(config, f"{stored}.attention", f"{path}/attn")
        rows += linear_rows(f"{stored}.mlp.dense_h_to_4h", f"{path}/mlp/up")
        rows += linear_rows(f"{stored}.mlp.dense_4h_to_h", f"{path}/mlp/down")
    head = "lm_head.weight" if "lm_head.weight" in names else "embed_out.weight"
    more, ties = head_rows(config, f"{prefix}embed_in.weight", head=head)
    return KeyTable((*rows, *more), ties, IGNORED)


def norm_rows(stored: str, path: str) -> list[Row]:
    """Gain and offset of a layer norm."""
    return [Row(f"{stored}.weight", f"{path}/scale"), Row(f"{stored}.bias", f"{path}/bias")]


def linear_rows(stored: str, path: str, pattern: str = LINEAR) -> list[Row]:
    """Kernel and bias of a linear map."""
    return [Row(f"{stored}.weight", f"{path}/kernel", pattern), Row(f"{stored}.bias", f"{path}/bias")]


def _attention_rows(config, stored, path):
    """The fused tensor holds, head after head, its queries, keys and values; the first units of q and k turn."""
    parts = [(f"{side}{name}", size) for side in "qk" for name, _, size in decoder.qk_parts(config)]
    parts.append(("v", config.head_width))
    paths, sizes = zip(*parts, strict=True)
    dims = {"kv": config.num_kv_heads}
    one_query = {"q": "kv 1 unit"}
    kernels = tuple(f"unit kv in -> in {one_query.get(part[0], 'kv unit')}" for part in paths)
    rows = [
        Row(
            f"{stored}.query_key_value.weight",
            tuple(f"{path}/{part}/kernel" for part in paths),
            kernels,
            dims,
            sizes=sizes,
            before="(kv unit) in -> unit kv in",
        ),
        Row(f"{stored}.dense.weight", f"{path}/out/kernel", "out (kv unit) -> kv 1 unit out", dims),
    ]
    if config.qkv_bias:
        biases = tuple(f"unit kv -> {one_query.get(part[0], 'kv unit')}" for part in paths)
        leaves = tuple(f"{path}/{part}/bias" for part in paths)
        before = "(kv unit) -> unit kv"
        rows.append(Row(f"{stored}.query_key_value.bias", leaves, biases, dims, sizes=sizes, before=before))
    if config.out_bias:
        rows.append(Row(f"{stored}.dense.bias", f"{path}/out/bias"))
    return rows
