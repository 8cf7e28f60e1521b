"""OpenCLIP: the network of an open_clip_config.json whose towers are OpenCLIP's own transformers.

Towers of other libraries (timm, Hugging Face), ResNets, CoCa and attentional pooling are refused by name.
"""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import clip, vit
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.vision_rows import block_rows, norm_rows, patch_rows, read_image, under
from jaxtune.models.keys import KeyTable, Row

# What a tower's block may have besides what ours has; each refused unless it is off.
OFF = {
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "output_tokens": (False,),
    "act_kwargs": (None, {}),
}
VISION_OFF = {"timm_model_name": (None,), "attentional_pool": (False,), "pos_embed_type": ("learnable", "sin_cos_2d")}
TEXT_OFF = {
    "hf_model_name": (None,),
    "ls_init_value": (None,),
    "embed_cls": (False,),
    "proj_type": ("linear",),
    "final_ln_after_pool": (False,),
}
# Fields that nothing reads in evaluation, or only where another one is refused.
VISION_INERT = (
    "patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_pool", "timm_proj",
    "timm_proj_bias", "timm_drop", "timm_drop_path",
)  # fmt: skip
TEXT_INERT = (
    "pad_id", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type",
    "hf_pooler_type",
)  # fmt: skip
INERT = ("init_logit_scale", "custom_text", "nonscalar_logit_scale")
DEFAULTS = {"quick_gelu": False, "init_logit_bias": None}
TOWER = {"mlp_ratio": 4.0, "layers": 12, "norm_kwargs": None, "ls_init_value": None, "final_ln_after_pool": False}
VISION_DEFAULTS = TOWER | {
    "width": 768,
    "head_width": 64,
    "patch_size": 16,
    "image_size": 224,
    "no_ln_pre": False,
    "pool_type": "tok",
}
TEXT_DEFAULTS = TOWER | {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "eos_id": 2,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
}
POOLING = {"tok": "class", "avg": "patches"}
TEXT_POOLING = {"argmax": "max_id", "eos": "end", "last": "last"}
NORM_EPS = 1e-5
BLOCK = {
    "norm1": "ln_1",
    "weight": "attn.in_proj_weight",
    "bias": "attn.in_proj_bias",
    "out": "attn.out_proj",
    "norm2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
SCALES = {"scale1": "ls_1.gamma", "scale2": "ls_2.gamma"}
# The causal mask, and sizes that OpenAI's own files stored as tensors.
IGNORED = (r"(text\.)?attn_mask", "input_resolution", "context_length", "vocab_size")


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What only the tensors tell: an offset of the logits that training added."""
    del values
    return {"logit_bias": "logit_bias" in names}


def read_config(values: Mapping[str, Any]) -> clip.Config:
    """The network of an open_clip_config.json.

    Raises:
        ConfigError: a field that is not supported or not known, or sizes that make no sense.
    """
    model = values["model_cfg"]
    fields = _open(model, "model_cfg", DEFAULTS, {}, (*INERT, "embed_dim", "vision_cfg", "text_cfg"))
    activation = {"activation": "quick_gelu" if fields["quick_gelu"] else "gelu"}
    embed_dim = fields["embed_dim"]
    vision = _open(fields["vision_cfg"], "vision_cfg", VISION_DEFAULTS, OFF | VISION_OFF, VISION_INERT)
    text = _open(fields["text_cfg"], "text_cfg", TEXT_DEFAULTS, OFF | TEXT_OFF, TEXT_INERT)
    return clip.Config(
        vision=vit.Config(**_read_vision(vision), **activation, num_outputs=embed_dim),
        text=clip.TextConfig(**_read_text(text), **activation),
        embed_dim=embed_dim,
        logit_bias=values.get(FACTS, {}).get("logit_bias", fields["init_logit_bias"] is not None),
    )


def key_table(config: clip.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    prefix = "text." if any(name.startswith("text.") for name in names) else ""  # of a "custom" text tower
    is_vector = values["model_cfg"].get("nonscalar_logit_scale", False)
    scalars = ("logit_scale", "logit_bias") if config.logit_bias else ("logit_scale",)
    rows = [
        *under("vision/", _vision_rows(config.vision)),
        *under("text/", _text_rows(config.text, prefix)),
        *(Row(name, name, "1 ->" if is_vector else "") for name in scalars),
    ]
    return KeyTable(tuple(rows), ignored=IGNORED)


def _open(values, name, defaults, off, inert):
    """The fields of one dict, every one of which is known: OpenCLIP itself takes no other."""
    fields = Fields({"model_type": f"{name} of OpenCLIP", **values}, defaults)
    unknown = sorted(values.keys() - {*defaults, *off, *inert})
    if unknown:
        raise fields.error(
            f"{name} of open_clip_config.json has {', '.join(unknown)}, which {'are' if unknown[1:] else 'is'} not "
            f"supported. Known: {', '.join(sorted({*defaults, *off, *inert}))}."
        )
    for field, supported in off.items():
        if field in values:
            fields.only(field, *supported)
    return fields


def _read_tower(fields, num_heads):
    norm = dict(fields["norm_kwargs"] or {})
    eps = norm.pop("eps", NORM_EPS)
    if norm:
        raise fields.error(f'"norm_kwargs" is {fields["norm_kwargs"]!r}: only "eps" is supported.')
    if not isinstance(fields["layers"], int):
        raise fields.error(f'"layers" is {fields["layers"]!r}: a ResNet tower, which is not supported.')
    return {
        "width": fields["width"],
        "depth": fields["layers"],
        "num_heads": num_heads,
        "mlp_width": int(fields["width"] * fields["mlp_ratio"]),
        "norm_eps": eps,
    }


def _read_vision(fields):
    pool = fields.only("pool_type", *POOLING)
    return {
        **_read_tower(fields, fields["width"] // fields["head_width"]),
        **read_image(fields),
        "pooling": POOLING[pool],
        "norm_after_pooling": fields["final_ln_after_pool"] and pool == "avg",  # of one token it is the same
        "stream_norm": not fields["no_ln_pre"],
        "layer_scale": fields["ls_init_value"] is not None,
        "patch_bias": False,
        "head_bias": False,
    }


def _read_text(fields):
    pool = fields.only("pool_type", *TEXT_POOLING)
    return {
        **_read_tower(fields, fields["heads"]),
        "vocab_size": fields["vocab_size"],
        "context_length": fields["context_length"],
        "is_causal": not fields["no_causal_mask"],
        "pooling": TEXT_POOLING[pool],
        "end_id": fields["eos_id"] if pool == "eos" else None,
        "head_bias": fields["proj_bias"],
    }


def _vision_rows(config):
    block = BLOCK | (SCALES if config.layer_scale else {})
    return [
        *patch_rows("visual.conv1", has_bias=False),
        Row("visual.class_embedding", "class_token"),
        Row("visual.positional_embedding", "position"),
        *(norm_rows("visual.ln_pre", "stream_norm") if config.stream_norm else []),
        *_stack_rows(config, "visual.", block),
        *norm_rows("visual.ln_post", "final_norm"),
        Row("visual.proj", "head/kernel"),
    ]


def _text_rows(config, prefix):
    projection = [Row(f"{prefix}text_projection", "projection/kernel")]
    if config.head_bias:
        projection = [
            Row(f"{prefix}text_projection.weight", "projection/kernel", "out in -> in out"),
            Row(f"{prefix}text_projection.bias", "projection/bias"),
        ]
    return [
        Row(f"{prefix}token_embedding.weight", "token_embedding"),
        Row(f"{prefix}positional_embedding", "position"),
        *_stack_rows(config, prefix, BLOCK),
        *norm_rows(f"{prefix}ln_final", "final_norm"),
        *projection,
    ]


def _stack_rows(config, prefix, block):
    rows = []
    for index in range(config.depth):
        rows += block_rows(config, f"block_{index}", f"{prefix}transformer.resblocks.{index}", block)
    return rows
