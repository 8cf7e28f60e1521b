"""CLIP of transformers: both towers, or one of them alone, with or without its projection."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import clip, clip_text, vit
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.vision_rows import block_rows, dense_rows, norm_rows, patch_rows, read_image, under
from jaxtune.models.keys import KeyTable, Row

TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
BLOCK = {
    "norm1": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
# Counts that older releases stored beside the weights.
IGNORED = (r"((text|vision)_model\.)?embeddings\.position_ids",)
LEGACY_END = 2  # a wrong id of older files, read as: where the greatest id stands

Config = clip.Config | clip_text.Config | vit.Config


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What the tensors of one tower tell: whether its projection is with it."""
    del values
    return {"projection": any(name in names for name in ("visual_projection.weight", "text_projection.weight"))}


def read_config(values: Mapping[str, Any]) -> Config:
    """The network of a config.json; of one tower alone where its model_type says so.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    if values["model_type"] == "clip_text_model":
        fields = Fields(values, TEXT_DEFAULTS)
        has_head = _has_projection(fields, "CLIPTextModel")
        text = clip.TextConfig(**_read_text(fields), head="linear" if has_head else "none")
        return clip_text.Config(text=text, embed_dim=fields["projection_dim"] if has_head else text.width)
    if values["model_type"] == "clip_vision_model":
        fields = Fields(values, VISION_DEFAULTS)
        sizes = _read_vision(fields)
        if _has_projection(fields, "CLIPVisionModel"):
            return vit.Config(**sizes, num_outputs=fields["projection_dim"])
        return vit.Config(**sizes, head="none", num_outputs=sizes["width"])
    fields = Fields(values, {"projection_dim": 512})
    fields.head({"CLIPModel": "both"})
    embed_dim = fields["projection_dim"]
    vision = _read_vision(Fields(tower_of(values, "vision_config", VISION_DEFAULTS), VISION_DEFAULTS))
    text = _read_text(Fields(tower_of(values, "text_config", TEXT_DEFAULTS), TEXT_DEFAULTS))
    return clip.Config(
        vision=vit.Config(**vision, num_outputs=embed_dim), text=clip.TextConfig(**text), embed_dim=embed_dim
    )


def key_table(config: Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    if isinstance(config, clip.Config):
        vision = _vision_rows(config.vision, "vision_model.", "visual_projection")
        text = _text_rows(config.text, "text_model.", "text_projection")
        rows = [*under("vision/", vision), *under("text/", text), Row("logit_scale", "logit_scale")]
    elif isinstance(config, vit.Config):
        rows = _vision_rows(config, prefix_of(names, "vision_model."), "visual_projection")
    else:
        rows = _text_rows(config.text, prefix_of(names, "text_model."), "text_projection")
    return KeyTable(tuple(rows), ignored=IGNORED)


def tower_of(values: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one tower; older files have a second dict of them, which wins with its defaults and all."""
    tower, legacy = values.get(name) or {}, values.get(f"{name}_dict")
    if legacy is not None:
        tower = {**tower, **defaults, **legacy}
    return {"model_type": f"{values['model_type']} ({name})", **tower}


def prefix_of(names: Collection[str], prefix: str) -> str:
    """`prefix` where a single tower's tensors have it; newer releases write a bare one without."""
    return prefix if any(name.startswith(prefix) for name in names) else ""


def read_sizes(fields: Fields) -> dict[str, Any]:
    """What both towers have in common, as fields of our configs."""
    return {
        "width": fields["hidden_size"],
        "depth": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "mlp_width": fields["intermediate_size"],
        "activation": fields.activation("hidden_act"),
        "norm_eps": fields["layer_norm_eps"],
    }


def encoder_rows(config: vit.Config | clip.TextConfig, prefix: str) -> list[Row]:
    """The blocks of a tower."""
    rows = []
    for index in range(config.depth):
        rows += block_rows(config, f"block_{index}", f"{prefix}encoder.layers.{index}", BLOCK)
    return rows


def _has_projection(fields, bare):
    kinds = {"WithProjection": True, bare: False}
    if not fields.values.get("architectures"):
        return fields.values.get(FACTS, {}).get("projection", True)
    return fields.head(kinds)


def _read_vision(fields):
    return {
        **read_sizes(fields),
        **read_image(fields),
        "channels": fields["num_channels"],
        "stream_norm": True,
        "patch_bias": False,
        "head_bias": False,
    }


def _read_text(fields):
    end = fields["eos_token_id"]
    if not isinstance(end, int):
        raise fields.error(f'"eos_token_id" is {end!r} in config.json: one id is supported, which a text is read at.')
    pooling = {"pooling": "max_id"} if end == LEGACY_END else {"pooling": "end", "end_id": end}
    sizes = {"vocab_size": fields["vocab_size"], "context_length": fields["max_position_embeddings"]}
    return {**read_sizes(fields), **sizes, **pooling}


def _vision_rows(config, prefix, projection):
    rows = [
        *patch_rows(f"{prefix}embeddings.patch_embedding", has_bias=False),
        Row(f"{prefix}embeddings.class_embedding", "class_token"),
        Row(f"{prefix}embeddings.position_embedding.weight", "position"),
        *norm_rows(f"{prefix}pre_layrnorm", "stream_norm"),
        *encoder_rows(config, prefix),
        *norm_rows(f"{prefix}post_layernorm", "final_norm"),
    ]
    return rows + (dense_rows(projection, "head", has_bias=False) if config.head != "none" else [])


def _text_rows(config, prefix, projection):
    rows = [
        Row(f"{prefix}embeddings.token_embedding.weight", "token_embedding"),
        Row(f"{prefix}embeddings.position_embedding.weight", "position"),
        *encoder_rows(config, prefix),
        *norm_rows(f"{prefix}final_layer_norm", "final_norm"),
    ]
    return rows + (dense_rows(projection, "projection", has_bias=False) if config.head != "none" else [])
