"""SigLIP of transformers: an image tower that pools by attention, a text tower that sees both ways, a sigmoid loss."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import clip, clip_text, vit
from jaxtune.models.hub.clip import IGNORED, encoder_rows, prefix_of, read_sizes, tower_of
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.vision_rows import attention_rows, dense_rows, norm_rows, patch_rows, read_image, under
from jaxtune.models.keys import KeyTable, Row

TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}

Config = clip.Config | clip_text.Config | vit.Config


def read_config(values: Mapping[str, Any]) -> Config:
    """The network of a config.json; of one tower alone where its model_type says so.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    if values["model_type"] == "siglip_vision_model":
        fields = Fields(values, VISION_DEFAULTS)
        fields.head({"SiglipVisionModel": "vision"})
        return _read_vision(fields)
    if values["model_type"] == "siglip_text_model":
        fields = Fields(values, TEXT_DEFAULTS)
        fields.head({"SiglipTextModel": "text"})
        return clip_text.Config(text=_read_text(fields), embed_dim=_dim_of(fields))
    Fields(values, {}).head({"SiglipModel": "both"})
    text = Fields(tower_of(values, "text_config", TEXT_DEFAULTS), TEXT_DEFAULTS)
    vision = Fields(tower_of(values, "vision_config", VISION_DEFAULTS), VISION_DEFAULTS)
    return clip.Config(vision=_read_vision(vision), text=_read_text(text), embed_dim=_dim_of(text), logit_bias=True)


def key_table(config: Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    if isinstance(config, clip.Config):
        scalars = [Row(name, name, "1 ->") for name in ("logit_scale", "logit_bias")]
        vision, text = _vision_rows(config.vision, "vision_model."), _text_rows(config.text, "text_model.")
        rows = [*under("vision/", vision), *under("text/", text), *scalars]
    elif isinstance(config, vit.Config):
        rows = _vision_rows(config, prefix_of(names, "vision_model."))
    else:
        rows = _text_rows(config.text, prefix_of(names, "text_model."))
    return KeyTable(tuple(rows), ignored=IGNORED)


def _dim_of(fields):
    return fields["projection_size"] or fields["hidden_size"]


def _read_vision(fields):
    fields.only("vision_use_head", True)
    return vit.Config(
        **read_sizes(fields),
        **read_image(fields),
        channels=fields["num_channels"],
        pooling="attention",
        head="none",
        num_outputs=fields["hidden_size"],
    )


def _read_text(fields):
    return clip.TextConfig(
        **read_sizes(fields),
        vocab_size=fields["vocab_size"],
        context_length=fields["max_position_embeddings"],
        is_causal=False,
        pooling="last",
        head_bias=True,
    )


def _vision_rows(config, prefix):
    head = f"{prefix}head"
    attention = {name: f"{head}.attention.in_proj_{name}" for name in ("weight", "bias")}
    attention["out"] = f"{head}.attention.out_proj"
    return [
        *patch_rows(f"{prefix}embeddings.patch_embedding", has_bias=True),
        Row(f"{prefix}embeddings.position_embedding.weight", "position"),
        *encoder_rows(config, prefix),
        *norm_rows(f"{prefix}post_layernorm", "final_norm"),
        Row(f"{head}.probe", "pool/probe", "1 1 width -> width"),
        *attention_rows("pool/attn", config.num_heads, config.width, attention),
        *norm_rows(f"{head}.layernorm", "pool/norm"),
        *dense_rows(f"{head}.mlp.fc1", "pool/mlp/up"),
        *dense_rows(f"{head}.mlp.fc2", "pool/mlp/down"),
    ]


def _text_rows(config, prefix):
    return [
        Row(f"{prefix}embeddings.token_embedding.weight", "token_embedding"),
        Row(f"{prefix}embeddings.position_embedding.weight", "position"),
        *encoder_rows(config, prefix),
        *norm_rows(f"{prefix}final_layer_norm", "final_norm"),
        *dense_rows(f"{prefix}head", "projection"),
    ]
