"""DINOv2 of transformers, with and without registers: layer scale, SwiGLU in the giant, two features to classify."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import vit
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.vision_rows import TOKENS
from jaxtune.models.hub.vit import DEFAULTS as VIT_DEFAULTS
from jaxtune.models.hub.vit import prefix_of, read_sizes, trunk_rows
from jaxtune.models.keys import LINEAR, KeyTable, Row

DEFAULTS = VIT_DEFAULTS | {
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4,
    "use_swiglu_ffn": False,
    "use_mask_token": True,
    "num_register_tokens": 4,
}
PATCH_SIZES = {"dinov2": 14, "dinov2_with_registers": 16}  # where config.json is silent
CLASSES = {"ForImageClassification": "linear", "Dinov2Model": "none", "Dinov2WithRegistersModel": "none"}
BLOCK = {
    "norm1": "norm1",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "out": "attention.output.dense",
    "scale1": "layer_scale1.lambda1",
    "norm2": "norm2",
    "scale2": "layer_scale2.lambda1",
}
PLAIN = {"up": "mlp.fc1", "down": "mlp.fc2"}
GATED = {"gate_up": "mlp.weights_in", "down": "mlp.weights_out"}


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What the tensors tell and older files do not: a token of masked pre-training."""
    del values
    return {"mask_token": any(name.endswith("embeddings.mask_token") for name in names)}


def read_config(values: Mapping[str, Any]) -> vit.Config:
    """The network of a config.json.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    fields = Fields(values, DEFAULTS | {"patch_size": PATCH_SIZES[values["model_type"]]})
    head, is_gated = fields.head(CLASSES), fields["use_swiglu_ffn"]
    has_registers = fields.model_type == "dinov2_with_registers"
    hidden = int(fields["hidden_size"] * fields["mlp_ratio"])
    sizes = read_sizes(fields) | {
        # Two thirds for each of the two kernels, up to a multiple of eight.
        "mlp_width": (int(hidden * 2 / 3) + 7) // 8 * 8 if is_gated else hidden,
        "mask_token": values.get(FACTS, {}).get("mask_token", has_registers or fields["use_mask_token"]),
    }
    if is_gated:
        sizes["activation"] = "silu"  # whatever "hidden_act" says
    reads_two = head == "linear"
    return vit.Config(
        **sizes,
        layer_scale=True,
        is_gated=is_gated,
        num_registers=(fields["num_register_tokens"] or None) if has_registers else None,
        positions="class_and_patches" if has_registers else "all",
        pooling="class_and_patches" if reads_two else "class",
        head=head,
        num_outputs=fields.num_labels() if reads_two else sizes["width"],
    )


def key_table(config: vit.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    prefix = prefix_of(names, f"{values['model_type']}.")
    block = BLOCK | (GATED if config.is_gated else PLAIN)
    rows = trunk_rows(config, prefix, block, mask_token="1 width -> width")  # an axis less than the other tokens
    if config.num_registers:
        rows.append(Row(f"{prefix}embeddings.register_tokens", "registers", TOKENS))
    if config.head == "linear":
        # One kernel over the class token and the mean of the patches, side by side.
        kernels, halves = ("head/kernel", "head_patches/kernel"), (config.width, config.width)
        rows.append(Row("classifier.weight", kernels, sizes=halves, before=LINEAR))
        rows.append(Row("classifier.bias", "head/bias"))
    return KeyTable(tuple(rows))
