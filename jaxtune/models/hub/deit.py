"""DeiT of transformers: a ViT with a distillation token, whose classifiers read one token or both."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import vit
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.vision_rows import TOKEN, dense_rows
from jaxtune.models.hub.vit import DEFAULTS, facts, prefix_of, read_head, read_sizes, trunk_rows
from jaxtune.models.keys import KeyTable, Row

__all__ = ["facts", "key_table", "read_config"]

CLASSES = {"ForImageClassification": "linear", "ForImageClassificationWithTeacher": "two", "DeiTModel": "tanh"}


def read_config(values: Mapping[str, Any]) -> vit.Config:
    """The network of a config.json.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    fields = Fields(values, DEFAULTS)
    head = fields.head(CLASSES)
    options = {"pooling": "class_and_distillation"} if head == "two" else {}
    options |= read_head(fields, "linear" if head == "two" else head)
    return vit.Config(**read_sizes(fields), **options, distillation_token=True)


def key_table(config: vit.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    prefix = prefix_of(names, "deit.")
    rows = [Row(f"{prefix}embeddings.distillation_token", "distillation_token", TOKEN)]
    if config.pooling == "class_and_distillation":
        rows += dense_rows("cls_classifier", "head") + dense_rows("distillation_classifier", "head_distillation")
    elif config.head != "none":
        rows += dense_rows("classifier" if config.head == "linear" else f"{prefix}pooler.dense", "head")
    return KeyTable((*trunk_rows(config, prefix), *rows))
