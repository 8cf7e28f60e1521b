"""ResNets by their names in transformers, and by those that torchvision and timm share.

transformers says "model_type": "resnet" and names a stage's blocks one by one with their sizes. A timm folder has no
model_type but an "architecture" ("resnet50"), which stands for all sizes; for a bare torchvision file write the same:
{"architecture": "resnet50", "num_classes": 1000}. Counters of batches (`num_batches_tracked`) are carried along.
"""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import resnet_imagenet
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.vision_rows import PATCH, dense_rows
from jaxtune.models.keys import KeyTable, Row

# Of transformers' config.json.
DEFAULTS = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": (256, 512, 1024, 2048),
    "depths": (3, 4, 6, 3),
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
CLASSES = {"ForImageClassification": "linear", "ResNetModel": "none"}
REDUCTION = 4  # of the channels in a bottleneck

# Of timm and torchvision: architecture -> (block, depths, times the channels inside).
ARCHITECTURES = {
    "resnet18": ("basic", (2, 2, 2, 2), 1),
    "resnet34": ("basic", (3, 4, 6, 3), 1),
    "resnet26": ("bottleneck", (2, 2, 2, 2), 1),
    "resnet50": ("bottleneck", (3, 4, 6, 3), 1),
    "resnet101": ("bottleneck", (3, 4, 23, 3), 1),
    "resnet152": ("bottleneck", (3, 8, 36, 3), 1),
    "resnet200": ("bottleneck", (3, 24, 36, 3), 1),
    "wide_resnet50_2": ("bottleneck", (3, 4, 6, 3), 2),
    "wide_resnet101_2": ("bottleneck", (3, 4, 23, 3), 2),
}
STAGE_WIDTHS = (64, 128, 256, 512)
MODEL_ARGS = ("global_pool", "in_chans", "num_classes")

IGNORED = (r".*\.num_batches_tracked",)


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Whether the file has the linear layer: timm leaves it out with its classes."""
    del values
    return {"head": any(name in ("fc.weight", "classifier.1.weight") for name in names)}


def read_config(values: Mapping[str, Any]) -> resnet_imagenet.Config:
    """The network of a config.json.

    Raises:
        ConfigError: an architecture or a field that is not supported; names it.
    """
    return _read_timm(values) if "model_type" not in values else _read_transformers(values)


def key_table(config: resnet_imagenet.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    if "model_type" not in values:
        rows = [*_rows("conv1", "bn1", "stem_conv", "stem_norm")]
        for block in resnet_imagenet.blocks_of(config):
            stored = f"layer{block.stage + 1}.{block.index}"
            for layer in block.layers:
                own = (f"{stored}.conv{layer.index}", f"{stored}.bn{layer.index}")
                rows += _rows(*own, *_paths(block, layer))
            if block.shortcut:
                rows += _rows(f"{stored}.downsample.0", f"{stored}.downsample.1", *_paths(block, block.shortcut))
        head = "fc"
    else:
        prefix = "resnet." if any(name.startswith("resnet.") for name in names) else ""
        rows = [*_unit_rows(f"{prefix}embedder.embedder", "stem_conv", "stem_norm")]
        for block in resnet_imagenet.blocks_of(config):
            stored = f"{prefix}encoder.stages.{block.stage}.layers.{block.index}"
            for layer in block.layers:
                rows += _unit_rows(f"{stored}.layer.{layer.index - 1}", *_paths(block, layer))
            if block.shortcut:
                rows += _unit_rows(f"{stored}.shortcut", *_paths(block, block.shortcut))
        head = "classifier.1"
    rows += dense_rows(head, "head") if config.head == "linear" else []
    return KeyTable(tuple(rows), ignored=IGNORED)


def _read_transformers(values):
    fields = Fields(values, DEFAULTS)
    fields.only("hidden_act", "relu")
    block = fields.only("layer_type", "basic", "bottleneck")
    widths = tuple(fields["hidden_sizes"])
    is_basic = block == "basic"
    has_head = fields.head(CLASSES) == "linear"
    return resnet_imagenet.Config(
        num_outputs=fields.num_labels() if has_head else widths[-1],
        block=block,
        depths=tuple(fields["depths"]),
        widths=widths,
        inner_widths=widths if is_basic else tuple(width // REDUCTION for width in widths),
        stem_width=fields["embedding_size"],
        first_stride=2 if fields.only("downsample_in_first_stage", False, True) else 1,
        # Basic blocks stride in their first convolution whatever this says, in transformers too.
        stride_in="conv1" if fields.only("downsample_in_bottleneck", False, True) and not is_basic else "conv2",
        head="linear" if has_head else "none",
        channels=fields["num_channels"],
    )


def _read_timm(values):
    architecture = str(values.get("architecture"))
    name = architecture.split(".")[0].removeprefix("tv_")
    fields = Fields({**values, "model_type": architecture}, {"global_pool": "avg", "num_classes": 1000})
    if name not in ARCHITECTURES:
        raise fields.error(
            f'"architecture" is {architecture!r} in config.json. ResNets with another stem, groups, attention or '
            f"anti-aliasing are not supported; supported: {', '.join(ARCHITECTURES)}."
        )
    changed = fields.get("model_args") or {}
    odd = sorted(set(changed) - set(MODEL_ARGS))
    if odd:
        raise fields.error(f'"model_args" sets {", ".join(odd)} in config.json; supported: {", ".join(MODEL_ARGS)}.')
    fields = Fields({**fields.values, **changed}, fields.defaults)
    fields.only("global_pool", "avg")
    block, depths, times = ARCHITECTURES[name]
    expansion = 1 if block == "basic" else REDUCTION
    widths = tuple(expansion * width for width in STAGE_WIDTHS)
    has_head = bool(fields["num_classes"]) and fields.values.get(FACTS, {}).get("head", True)
    input_size = (fields.get("pretrained_cfg") or {}).get("input_size") or (3,)
    return resnet_imagenet.Config(
        num_outputs=fields["num_classes"] if has_head else widths[-1],
        block=block,
        depths=depths,
        widths=widths,
        inner_widths=tuple(times * width for width in STAGE_WIDTHS),
        head="linear" if has_head else "none",
        channels=fields.get("in_chans") or input_size[0],
    )


def _paths(block, layer):
    """Our convolution and norm of a layer of a block."""
    if layer is block.shortcut:
        return f"{block.path}/shortcut_conv", f"{block.path}/shortcut_norm"
    return f"{block.path}/conv{layer.index}", f"{block.path}/norm{layer.index}"


def _unit_rows(stored, conv, norm):
    return _rows(f"{stored}.convolution", f"{stored}.normalization", conv, norm)


def _rows(stored_conv, stored_norm, conv, norm):
    """A convolution without a bias and the batch norm behind it."""
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return [
        Row(f"{stored_conv}.weight", f"{conv}/kernel", PATCH),
        *(Row(f"{stored_norm}.{theirs}", f"{norm}/{ours}") for theirs, ours in names.items()),
    ]
