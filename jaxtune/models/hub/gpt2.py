"""GPT-2: learned positions, kernels stored [in, out], queries, keys and values side by side in one of them."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.decoder_fields import read_head
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.gpt_neox import linear_rows, norm_rows
from jaxtune.models.hub.llama_like import head_rows
from jaxtune.models.keys import KeyTable, Row

DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
# The causal mask, stored by older releases.
IGNORED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a GPT-2."""
    fields = Fields(values, DEFAULTS)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    heads, width = fields["n_head"], fields["n_embd"]
    return decoder.Config(
        vocab_size=fields["vocab_size"],
        width=width,
        depth=fields["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_width=width // heads,
        mlp_width=fields["n_inner"] or 4 * width,
        activation=fields.activation("activation_function"),
        gated=False,
        norm="layer",
        norm_eps=fields["layer_norm_epsilon"],
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        num_positions=fields["n_positions"],
        attention_scale=None if fields["scale_attn_weights"] else 1.0,
        **read_head(fields),
    )


def key_table(config: decoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    prefix = "" if "wte.weight" in names else "transformer."
    rows = [Row(f"{prefix}wte.weight", "embed/token"), Row(f"{prefix}wpe.weight", "embed/position")]
    rows += norm_rows(f"{prefix}ln_f", "final_norm")
    for index in range(config.depth):
        stored, path = f"{prefix}h.{index}", f"block_{index}"
        rows += norm_rows(f"{stored}.ln_1", f"{path}/norm1")
        rows += norm_rows(f"{stored}.ln_2", f"{path}/norm2")
        rows += _attention_rows(config, f"{stored}.attn", f"{path}/attn")
        rows += linear_rows(f"{stored}.mlp.c_fc", f"{path}/mlp/up", "")
        rows += linear_rows(f"{stored}.mlp.c_proj", f"{path}/mlp/down", "")
    more, ties = head_rows(config, f"{prefix}wte.weight")
    return KeyTable((*rows, *more), ties, IGNORED)


def _attention_rows(config, stored, path):
    dims, sizes = {"kv": config.num_kv_heads}, (config.num_heads * config.head_width,) * 3
    kernels = ("(kv unit) in -> in kv 1 unit", "(kv unit) in -> in kv unit", "(kv unit) in -> in kv unit")
    biases = ("(kv unit) -> kv 1 unit", "(kv unit) -> kv unit", "(kv unit) -> kv unit")
    paths = {leaf: tuple(f"{path}/{part}/{leaf}" for part in "qkv") for leaf in ("kernel", "bias")}
    return [
        Row(f"{stored}.c_attn.weight", paths["kernel"], kernels, dims, sizes=sizes, before="in out -> out in"),
        Row(f"{stored}.c_attn.bias", paths["bias"], biases, dims, sizes=sizes),
        Row(f"{stored}.c_proj.weight", f"{path}/out/kernel", "(kv unit) out -> kv 1 unit out", dims),
        Row(f"{stored}.c_proj.bias", f"{path}/out/bias"),
    ]
