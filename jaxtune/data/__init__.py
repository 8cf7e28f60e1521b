"""Images and texts by index: sources, their shifts, and batches of them in a seeded order."""

from jaxtune.data.arrays import ArraySource, open_npz
from jaxtune.data.loader import Loader
from jaxtune.data.parts import JoinedSource, PartSource, take_classes, take_few, take_half, take_sample
from jaxtune.data.shifts import SHIFTS, MappedSource, invert, noise, occlude, rotate, shift_source
from jaxtune.data.source import SPLITS, DataSource, open_source
from jaxtune.data.texts import TextSource, open_texts

__all__ = [
    "SHIFTS", "SPLITS", "ArraySource", "DataSource", "JoinedSource", "Loader", "MappedSource", "PartSource",
    "TextSource", "invert", "noise", "occlude", "open_npz", "open_source", "open_texts", "rotate", "shift_source",
    "take_classes", "take_few", "take_half", "take_sample",
]  # fmt: skip
