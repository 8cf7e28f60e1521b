"""timm's names of vision transformers: what each of them builds, in timm's own words.

A config.json of timm names an architecture and little else; how many heads share a width stands nowhere else, and no
tensor tells it. What is not matched here is refused by name.
"""

import re
from typing import Any

# Word -> embed_dim, depth, num_heads, mlp_ratio.
SIZES: dict[str, tuple[int, int, int, float]] = {
    "wee": (256, 14, 4, 5),
    "xsmall": (256, 10, 4, 4),
    "little": (320, 14, 5, 5.6),
    "tiny": (192, 12, 3, 4),
    "small": (384, 12, 6, 4),
    "medium": (512, 12, 8, 4),
    "mediumd": (512, 20, 8, 4),
    "betwixt": (640, 12, 10, 4),
    "base": (768, 12, 12, 4),
    "so150m": (896, 18, 14, 2.572),
    "so150m2": (832, 21, 13, 34 / 13),
    "large": (1024, 24, 16, 4),
    "so400m": (1152, 27, 16, 3.7362),
    "huge": (1280, 32, 16, 4),
    "giant": (1408, 40, 16, 48 / 11),
    "giantopt": (1536, 40, 16, 4),
    "gigantic": (1664, 48, 16, 64 / 13),
}

GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
REG_GAP = {"class_token": False, "global_pool": "avg", "no_embed_class": True, "init_values": 1e-5}
CLIP = {"pre_norm": True, "norm_eps": 1e-5}
MAP = {"class_token": False, "global_pool": "map"}
TANH, SCALED = {"act_layer": "gelu_tanh"}, {"init_values": 1e-5}
DINO = {"init_values": 1e-5}
DINO_GIANT = {"embed_dim": 1536, "num_heads": 24, "mlp_ratio": 2.66667 * 2, "mlp_layer": "swiglu_packed"}
REGISTERED = {"no_embed_class": True}
DEIT3 = {"no_embed_class": True, "init_values": 1e-6}

# Pattern of the whole name, with a size and often a patch and a number of registers -> what it has besides. The first
# that fits counts.
RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"vit_(?P<size>tiny|small|base|large|huge|giant|gigantic)_patch(?P<patch>\d+)_\d+", {}),
    (r"vit_(?P<size>base)_patch(?P<patch>16)_224_miil", {"qkv_bias": False}),
    (r"vit_(?P<size>medium|betwixt)_patch(?P<patch>16)_gap_\d+", GAP | SCALED | {"qkv_bias": False}),
    (r"vit_(?P<size>base)_patch(?P<patch>16)_gap_224", GAP | {"num_heads": 16}),
    (r"vit_(?P<size>huge|giant)_patch(?P<patch>\d+)_gap_\d+", GAP),
    (r"vit_(?P<size>xsmall|medium|betwixt|base|large|huge|giant|gigantic)_patch(?P<patch>\d+)_clip_\d+", CLIP),
    (r"vit_(?P<size>base)_patch(?P<patch>16)_plus_clip_240", CLIP | {"embed_dim": 896, "num_heads": 14}),
    (
        r"vit_(?P<size>base|large|huge|gigantic)_patch(?P<patch>\d+)_clip_quickgelu_\d+",
        CLIP | {"act_layer": "quick_gelu"},
    ),
    (r"vit_(?P<size>base)_patch(?P<patch>\d+)_plus_(240|256)", SCALED | {"embed_dim": 896, "num_heads": 14}),
    (r"vit_(?P<size>small)_patch(?P<patch>16)_36x1_224", SCALED | {"depth": 36}),
    (r"eva_(?P<size>large)_patch(?P<patch>14)_(196|336)", {"global_pool": "avg"}),
    (r"flexivit_(?P<size>small|base|large)", {"no_embed_class": True}),
    (r"vit_(?P<size>small|base|large)_patch(?P<patch>14)_dinov2", DINO),
    (r"vit_(?P<size>giant)_patch(?P<patch>14)_dinov2", DINO | DINO_GIANT),
    (r"vit_(?P<size>small|base|large)_patch(?P<patch>14)_reg(?P<registers>4)_dinov2", DINO | REGISTERED),
    (r"vit_(?P<size>giant)_patch(?P<patch>14)_reg(?P<registers>4)_dinov2", DINO | DINO_GIANT | REGISTERED),
    (r"vit_(?P<size>base|large|so400m)_patch(?P<patch>14)_reg(?P<registers>1)_tipsv2", DINO | REGISTERED),
    (r"vit_(?P<size>giant)_patch(?P<patch>14)_reg(?P<registers>1)_tipsv2", DINO | DINO_GIANT | REGISTERED),
    (r"vit_(?P<size>base)_patch(?P<patch>32)_siglip_256", MAP | TANH),
    (r"vit_(?P<size>large)_patch(?P<patch>16)_siglip_512", MAP | TANH),
    (r"vit_(?P<size>so400m|giantopt)_patch(?P<patch>16)_siglip_\d+", MAP | TANH),
    (r"vit_(?P<size>base|large|so400m)_patch(?P<patch>14|16)_siglip_\d+", MAP),
    (r"vit_(?P<size>base)_patch(?P<patch>32)_siglip_gap_256", GAP | TANH),
    (r"vit_(?P<size>large)_patch(?P<patch>16)_siglip_gap_512", GAP | TANH),
    (r"vit_(?P<size>so400m|giantopt)_patch(?P<patch>16)_siglip_gap_\d+", GAP | TANH),
    (r"vit_(?P<size>base|large|so400m)_patch(?P<patch>14|16)_siglip_gap_\d+", GAP),
    (r"vit_(?P<size>base)_patch(?P<patch>16)_reg(?P<registers>4)_gap_256", REG_GAP | {"init_values": None}),
    (r"vit_(?P<size>wee|little|medium|mediumd|betwixt)_patch(?P<patch>16)_reg(?P<registers>\d)_gap_\d+", REG_GAP),
    (r"vit_(?P<size>so150m)_patch(?P<patch>16)_reg(?P<registers>4)_gap_\d+", GAP),
    (
        r"vit_(?P<size>so150m2)_patch(?P<patch>16)_reg(?P<registers>1)_gap_\d+",
        REG_GAP | {"no_embed_class": False, "qkv_bias": False},
    ),
    (r"deit_(?P<size>tiny|small|base)_patch(?P<patch>16)_\d+", {}),
    (r"deit_(?P<size>tiny|small|base)_distilled_patch(?P<patch>16)_\d+", {"distilled": True}),
    (r"deit3_(?P<size>small|medium|base|large|huge)_patch(?P<patch>\d+)_\d+", DEIT3),
)


def arguments_of(architecture: str) -> dict[str, Any] | None:
    """What timm builds under a name, as arguments of its `VisionTransformer`; None where the name is not known here.

    Our own words among them, for classes that timm is given: `norm_eps`, and `distilled` for its
    `VisionTransformerDistilled`.
    """
    for pattern, options in RULES:
        match = re.fullmatch(pattern, architecture)
        if match is not None:
            groups = match.groupdict()
            sizes = dict(zip(("embed_dim", "depth", "num_heads", "mlp_ratio"), SIZES[groups["size"]], strict=True))
            tokens = {"patch_size": int(groups.get("patch") or 16), "reg_tokens": int(groups.get("registers") or 0)}
            return sizes | tokens | options
    return None
