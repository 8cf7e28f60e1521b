"""Accuracy on data that a user names: an .npz file, or a built-in source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.commands.pairs import parse_pairs
from jaxtune.data.source import DataSource, open_source
from jaxtune.errors import DataError
from jaxtune.evaluate.classifier import Metrics, evaluate_classifier
from jaxtune.models.readout import frozen_readout
from jaxtune.types import Params

SUPPORT_RECORDS = 2000  # of an unlimited source


@dataclass(frozen=True)
class Data:
    """A test split and how a model's outputs become classes on it.

    Attributes:
        source: Labelled images.
        embeddings: float32[C, D] for a frozen read-out by class name; None where outputs are logits.
    """

    source: DataSource
    embeddings: Any


def open_data(name: str | None, pairs: Sequence[str], config: Any) -> Data | None:
    """Opens the test split of what a user named, with options as NAME=VALUE; None for None.

    A model with as many outputs as there are classes is read as logits; any other through the frozen
    read-out, one fixed direction per class name.

    Raises:
        DataError: no such data, or it does not fit.
        UnknownNameError: no such built-in source.
    """
    if name is None:
        return None
    options = parse_pairs(pairs)
    if name == "glyphs":
        options.setdefault("num_records", SUPPORT_RECORDS)
    source = open_source(name, options.pop("split", "test"), **options)
    num_outputs = getattr(config, "num_outputs", None)
    if num_outputs is None:
        raise DataError(f"{name}: models of this family have no classes to measure; use jaxtune.evaluate from Python.")
    return Data(source, frozen_readout(source.class_names, num_outputs))


def measure_on(config: Any, params: Params, data: Data) -> Metrics:
    """Metrics of one model on the opened data."""
    return evaluate_classifier(config, params, data.source, embeddings=data.embeddings)
