"""ViT of transformers: what its config.json means, and its tensors. DeiT and DINOv2 read with the same parts."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import vit
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.vision_rows import TOKEN, TOKENS, block_rows, dense_rows, norm_rows, patch_rows, read_image
from jaxtune.models.keys import KeyTable, Row

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "pooler_output_size": None,
    "pooler_act": "tanh",
}
CLASSES = {"ForImageClassification": "linear", "ViTModel": "tanh"}
BLOCK = {
    "norm1": "layernorm_before",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "out": "attention.output.dense",
    "norm2": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What only the tensors tell: a pooler that the bare model may lack, a token of masked pre-training."""
    del values
    return {
        "pooler": any(name.endswith("pooler.dense.weight") for name in names),
        "mask_token": any(name.endswith("embeddings.mask_token") for name in names),
    }


def read_config(values: Mapping[str, Any]) -> vit.Config:
    """The network of a config.json.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    fields = Fields(values, DEFAULTS)
    return vit.Config(**read_sizes(fields), **read_head(fields, fields.head(CLASSES)))


def key_table(config: vit.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    prefix = prefix_of(names, "vit.")
    head = {"linear": "classifier", "tanh": f"{prefix}pooler.dense"}.get(config.head)
    return KeyTable((*trunk_rows(config, prefix), *(dense_rows(head, "head") if head else [])))


def read_sizes(fields: Fields) -> dict[str, Any]:
    """What all classes of the family have in common, as fields of our config."""
    width, num_heads = fields["hidden_size"], fields["num_attention_heads"]
    fields.only("head_dim", None, width // num_heads)
    return {
        **read_image(fields),
        "width": width,
        "depth": fields["num_hidden_layers"],
        "num_heads": num_heads,
        "mlp_width": fields["intermediate_size"],
        "channels": fields["num_channels"],
        "activation": fields.activation("hidden_act"),
        "norm_eps": fields["layer_norm_eps"],
        "qkv_bias": fields["qkv_bias"],
        "mask_token": fields.values.get(FACTS, {}).get("mask_token", False),
    }


def read_head(fields: Fields, head: str) -> dict[str, Any]:
    """Head and number of outputs; a bare model whose file has no pooler gives its features."""
    if head == "linear":
        return {"num_outputs": fields.num_labels()}
    width = fields["hidden_size"]
    if not fields.values.get(FACTS, {}).get("pooler", True):
        return {"head": "none", "num_outputs": width}
    fields.only("pooler_act", "tanh")
    return {"head": head, "num_outputs": fields["pooler_output_size"] or width}


def prefix_of(names: Collection[str], prefix: str) -> str:
    """`prefix` where the trunk's tensors have it, as behind a head; "" where they do not."""
    return prefix if any(name.startswith(prefix) for name in names) else ""


def trunk_rows(
    config: vit.Config, prefix: str, block: Mapping[str, str] = BLOCK, *, mask_token: str = TOKEN
) -> list[Row]:
    """Everything but the heads; `mask_token` is that token's pattern."""
    embeddings = f"{prefix}embeddings"
    rows = [
        *patch_rows(f"{embeddings}.patch_embeddings.projection", has_bias=True),
        Row(f"{embeddings}.cls_token", "class_token", TOKEN),
        Row(f"{embeddings}.position_embeddings", "position", TOKENS),
        *norm_rows(f"{prefix}layernorm", "final_norm"),
    ]
    for index in range(config.depth):
        stored = f"{prefix}encoder.layer.{index}"
        rows += block_rows(config, f"block_{index}", stored, block, has_qkv_bias=config.qkv_bias)
    return rows + ([Row(f"{embeddings}.mask_token", "mask_token", mask_token)] if config.mask_token else [])
