"""Vision transformers of timm: ViT, DeiT, DINOv2, CLIP's and SigLIP's image towers under timm's names.

A config.json of timm has an "architecture" in the place of a model_type. That name tells the heads and the choices
(`timm_architectures`), the tensors tell the sizes; both must agree on the width.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import vit
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.timm_architectures import arguments_of
from jaxtune.models.hub.vision_rows import TOKEN, TOKENS, attention_rows, block_rows, dense_rows, norm_rows, patch_rows
from jaxtune.models.keys import KeyTable, Row

# Arguments of timm's VisionTransformer and what they are where neither a name nor a file says.
DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "in_chans": 3,
    "num_classes": 1000,
    "global_pool": "token",
    "qkv_bias": True,
    "init_values": None,
    "class_token": True,
    "no_embed_class": False,
    "pre_norm": False,
    "fc_norm": None,
    "act_layer": "gelu",
    "mlp_layer": "plain",
    "norm_eps": 1e-6,
    "distilled": False,
}
OFF = {
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "proj_bias": (True,),
    "pos_embed": ("learn",),
    "final_norm": (True,),
    "pool_include_prefix": (False,),
    "dynamic_img_pad": (False,),
    "embed_norm_layer": (None,),
    "norm_layer": (None,),
    "attn_layer": (None,),
    "block_fn": (None,),
    "use_naflex": (None, False),
}
INERT = {
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "weight_init", "fix_init", "dynamic_img_size", "strict_img_size", "out_indices", "features_only",
}  # fmt: skip
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}
BLOCK = {
    "norm1": "norm1",
    "weight": "attn.qkv.weight",
    "bias": "attn.qkv.bias",
    "out": "attn.proj",
    "norm2": "norm2",
    "down": "mlp.fc2",
}
SCALES = {"scale1": "ls1.gamma", "scale2": "ls2.gamma"}


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The sizes that the tensors have, where `names` brings them; nothing of a file that is no vision transformer's."""
    del values
    patch, position = "patch_embed.proj.weight", "pos_embed"
    if not isinstance(names, Mapping) or not {patch, position, "blocks.0.mlp.fc2.weight"} <= names.keys():
        return {}
    width, channels, rows, columns = names[patch].shape
    return {
        "embed_dim": width,
        "in_chans": channels,
        "patch": [rows, columns],
        "depth": 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks.")),
        "hidden": names["blocks.0.mlp.fc2.weight"].shape[1],
        "num_positions": names[position].shape[1],
        "num_classes": names["head.weight"].shape[0] if "head.weight" in names else 0,
        "fc_norm": "fc_norm.weight" in names,
    }


def read_config(values: Mapping[str, Any]) -> vit.Config:
    """The network of a config.json, with the sizes of its tensors where they are known.

    Raises:
        ConfigError: an architecture or an argument that is not supported, or a width that is not the architecture's.
    """
    fields, seen = _open(values), values.get(FACTS) or {}
    width, num_heads = fields["embed_dim"], fields["num_heads"]
    if seen and seen["embed_dim"] != width:
        raise fields.error(
            f"the blocks are {seen['embed_dim']} wide, and a {fields.model_type} is {width}: which number of heads "
            'shares that width stands in no tensor. Put "model_args": {"embed_dim": ..., "num_heads": ...} into '
            "config.json."
        )
    is_gated = fields.only("mlp_layer", "plain", "swiglu_packed") == "swiglu_packed"
    hidden = seen.get("hidden") or int(width * fields["mlp_ratio"]) // (1 + is_gated)
    num_classes = seen.get("num_classes", fields["num_classes"])
    options = _read_tokens(fields)
    if seen and options["norm_after_pooling"] != seen["fc_norm"]:
        found, expected = ("fc_norm", "norm") if seen["fc_norm"] else ("norm", "fc_norm")
        raise fields.error(
            f"the file has {found} where a {fields.model_type} with global_pool {fields['global_pool']!r} has "
            f'{expected}. Put "model_args": {{"global_pool": ...}} as the network was trained with into config.json.'
        )
    activation = fields["act_layer"]
    if not is_gated and activation not in ACTIVATIONS:
        raise fields.error(f'"act_layer" is {activation!r}; supported: {", ".join(ACTIVATIONS)}.')
    return vit.Config(
        **options,
        **_read_sides(fields, seen, options),
        width=width,
        depth=seen.get("depth", fields["depth"]),
        num_heads=num_heads,
        mlp_width=hidden,
        num_outputs=num_classes or width,
        head="linear" if num_classes else "none",
        channels=seen.get("in_chans", fields["in_chans"]),
        activation="silu" if is_gated else ACTIVATIONS[activation],
        is_gated=is_gated,
        norm_eps=fields["norm_eps"],
        stream_norm=fields["pre_norm"],
        patch_bias=not fields["pre_norm"],
        qkv_bias=fields["qkv_bias"],
        layer_scale=bool(fields["init_values"]),
    )


def key_table(config: vit.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values, names
    rows = [*patch_rows("patch_embed.proj", has_bias=config.patch_bias), Row("pos_embed", "position", TOKENS)]
    if config.has_class_token:
        rows.append(Row("cls_token", "class_token", TOKEN))
    if config.distillation_token:
        rows.append(Row("dist_token", "distillation_token", TOKEN))
    if config.num_registers:
        rows.append(Row("reg_token", "registers", TOKENS))
    if config.stream_norm:
        rows += norm_rows("norm_pre", "stream_norm")
    block = BLOCK | ({"gate_up": "mlp.fc1"} if config.is_gated else {"up": "mlp.fc1"})
    block |= SCALES if config.layer_scale else {}
    for index in range(config.depth):
        rows += block_rows(config, f"block_{index}", f"blocks.{index}", block, has_qkv_bias=config.qkv_bias)
    rows += norm_rows("fc_norm" if config.norm_after_pooling else "norm", "final_norm")
    rows += _pool_rows(config) if config.pooling == "attention" else []
    heads = {"head": "head", "head_distillation": "head_dist"}
    return KeyTable((*rows, *(row for name in config.head_names for row in dense_rows(heads[name], name))))


def _open(values):
    """Arguments of timm's class: of the architecture, then what the file's own say, then of its "model_args"."""
    architecture = str(values["architecture"]).split(".")[0]  # what follows a dot names the weights
    given = values.get("model_args") or {}
    fields = Fields({"model_type": architecture, **given}, {})
    built = arguments_of(architecture)
    if built is None:
        raise fields.error(
            f'"architecture" is {architecture!r} in config.json, a network of timm that is not supported: vision '
            "transformers are known by names like vit_base_patch16_224, deit_small_distilled_patch16_224, "
            "deit3_base_patch16_224, vit_large_patch14_dinov2 (jaxtune/models/hub/timm_architectures.py)."
        )
    unknown = sorted(given.keys() - {*DEFAULTS, *built, *OFF, *INERT})
    if unknown:
        raise fields.error(f'"model_args" of config.json has {", ".join(unknown)}, which is not supported.')
    for name, supported in OFF.items():
        if name in given:
            fields.only(name, *supported)
    stored = values.get("pretrained_cfg") or values
    own = {name: stored[name] for name in ("num_classes", "global_pool") if stored.get(name) is not None}
    if stored.get("input_size"):
        channels, height, width = stored["input_size"]
        own |= {"in_chans": channels}
        if stored.get("fixed_input_size", True):
            own |= {"img_size": [height, width]}
    top = {name: values[name] for name in ("num_classes", "global_pool") if values.get(name) is not None}
    return Fields({"model_type": architecture}, DEFAULTS | own | built | top | dict(given))


def _read_tokens(fields):
    """Tokens before the patches, where positions lie, what is pooled and where the last norm stands."""
    pool = fields.only("global_pool", "token", "avg", "map")
    has_class, registers = fields["class_token"], fields["reg_tokens"]
    pooling = {"token": "class", "avg": "patches" if has_class else "mean", "map": "attention"}[pool]
    if fields["distilled"]:
        fields.only("global_pool", "token")
        pooling = "class_and_distillation"
    if (pool == "token" and not has_class) or (pool == "map" and (has_class or registers)):
        raise fields.error(
            f"global_pool {pool!r} with class_token {has_class} and {registers} registers is not supported."
        )
    after = fields["fc_norm"] if fields["fc_norm"] is not None else pool == "avg"
    if after and pool != "avg":
        raise fields.error(f"fc_norm with global_pool {pool!r} is not supported.")
    return {
        "pooling": pooling,
        "norm_after_pooling": after,
        "distillation_token": fields["distilled"],
        "num_registers": registers or None,
        "positions": "patches" if fields["no_embed_class"] else "all",
    }


def _read_sides(fields, seen, options):
    """Sides of the image and of a patch; the tensors decide where they are known."""
    (patch,) = _square(fields, "patches", seen["patch"] if seen else _pair(fields["patch_size"]))
    sizes = {"patch_size": patch, "ignores_rest": False}
    if seen:
        has_prefix = options["positions"] == "all"
        prefix = (fields["class_token"] + options["distillation_token"] + fields["reg_tokens"]) * has_prefix
        side = math.isqrt(max(seen["num_positions"] - prefix, 0))
        if side**2 != seen["num_positions"] - prefix:
            raise fields.error(f"{seen['num_positions'] - prefix} patches make no square image.")
        image = set(_pair(fields["img_size"]))
        if {size // patch for size in image} != {side}:
            return sizes | {"image_size": side * patch}
    (image,) = _square(fields, "images", _pair(fields["img_size"]))
    return sizes | {"image_size": image, "ignores_rest": bool(image % patch)}


def _square(fields, what, sides):
    if len(set(sides)) != 1:
        raise fields.error(f"{what} of {list(sides)} pixels: only squares are supported.")
    return set(sides)


def _pair(value):
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _pool_rows(config):
    stored = {"q": "attn_pool.q", "weight": "attn_pool.kv.weight", "bias": "attn_pool.kv.bias", "only": "kv"}
    return [
        Row("attn_pool.latent", "pool/probe", TOKEN),
        *attention_rows("pool/attn", config.num_heads, config.width, stored | {"out": "attn_pool.proj"}),
        *norm_rows("attn_pool.norm", "pool/norm"),
        *dense_rows("attn_pool.mlp.fc1", "pool/mlp/up"),
        *dense_rows("attn_pool.mlp.fc2", "pool/mlp/down"),
    ]
