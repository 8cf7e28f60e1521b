"""Changes of a task that leave its labels alone: what a model that knew it should, and does not, withstand.

A map, `map(batch, indices) -> batch`, changes images; what is random in it is a function of (seed, record), so
a shifted record is the same in every batch and epoch. A subset of the classes changes how many
records there are, and is a part of the source.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtune.data.parts import take_classes
from jaxtune.data.record_random import record_normal, record_uniform
from jaxtune.data.source import DataSource, check_indices, check_options
from jaxtune.errors import DataError, unknown_name

Batch = dict[str, np.ndarray]
Map = Callable[[Batch, np.ndarray], Batch]


def rotate(*, degrees: float) -> Map:
    """Turns every image counter-clockwise about its middle, by bilinear interpolation; outside is dark.

    Multiples of 90 degrees are exact where they keep the image's shape.
    """

    def turn(images):
        quarters, rest = divmod(degrees, 90)
        is_exact = rest == 0 and (quarters % 2 == 0 or images.shape[1] == images.shape[2])
        return np.rot90(images, int(quarters), axes=(1, 2)).copy() if is_exact else _turn(images, math.radians(degrees))

    return lambda batch, _: {**batch, "image": turn(batch["image"])}


def invert() -> Map:
    """Dark on bright for bright on dark."""
    return lambda batch, _: {**batch, "image": np.float32(1.0) - batch["image"]}


def occlude(*, size: int, seed: int = 0) -> Map:
    """Blanks a square of `size` pixels a side, anywhere within each image.

    Raises:
        DataError: `size` is below 1, or (when applied) larger than the images.
    """
    if size < 1:
        raise DataError(f"occlude: size must be at least 1 pixel, got {size}.")

    def blank(batch, indices):
        images = batch["image"]
        height, width = images.shape[1:3]
        if size > min(height, width):
            raise DataError(f"occlude: a square of {size} pixels does not fit into images of {height}x{width}.")
        place = record_uniform(seed, "occlude", indices, 2)
        top, left = (place * (height - size + 1, width - size + 1)).astype(np.int64).T
        rows, columns = np.arange(height)[None, :] - top[:, None], np.arange(width)[None, :] - left[:, None]
        is_row, is_column = (rows >= 0) & (rows < size), (columns >= 0) & (columns < size)
        is_blank = is_row[:, :, None, None] & is_column[:, None, :, None]
        return {**batch, "image": np.where(is_blank, np.float32(0.0), images)}

    return blank


def noise(*, std: float, seed: int = 0) -> Map:
    """Adds noise of standard deviation `std` to every pixel, then clips to [0, 1].

    Raises:
        DataError: `std` is negative.
    """
    if not std >= 0:
        raise DataError(f"noise: std must not be negative, got {std}.")

    def add(batch, indices):
        images = batch["image"]
        grain = record_normal(seed, "noise", indices, math.prod(images.shape[1:])).reshape(images.shape)
        return {**batch, "image": np.clip(images + np.float32(std) * grain, 0.0, 1.0)}

    return add


class MappedSource:
    """A source whose batches go through maps; `name` is what reports call it."""

    def __init__(self, source: DataSource, maps: Sequence[Map], *, name: str):
        self.name, self.split, self.class_names = name, source.split, source.class_names
        self._source, self._maps = source, tuple(maps)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Batch:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        indices = check_indices(self, indices)
        batch = self._source.__getitems__(indices)
        for change in self._maps:
            batch = change(batch, indices)
        return batch


def _shift_by(make_map):
    """A row of `SHIFTS` out of a map: (source, name, **options) -> source."""

    @functools.wraps(make_map)
    def shift(source, name, **options):
        return MappedSource(source, (make_map(**options),), name=name)

    return shift


def _shift_labels(source, name, *, classes: Sequence[str]):
    """Keeps the records of the named classes."""
    return take_classes(source, classes, name=name)


# Name -> (source, new name, **options) -> shifted source.
SHIFTS: dict[str, Callable[..., DataSource]] = {
    "rotate": _shift_by(rotate),
    "invert": _shift_by(invert),
    "occlude": _shift_by(occlude),
    "noise": _shift_by(noise),
    "label_subset": _shift_labels,
}


def shift_source(source: DataSource, name: str, **options: Any) -> DataSource:
    """The source under the named shift, itself a source: to train on, to evaluate on, to shift again.

    Args:
        source: What is shifted.
        name: A key of `SHIFTS`.
        **options: The shift's own: `degrees` of rotate; `size` and `seed` of occlude; `std` and `seed` of
            noise; `classes` of label_subset, by name.

    Raises:
        UnknownNameError: no such shift, option or class; lists the known ones.
        DataError: an option is missing or out of range.
    """
    if name not in SHIFTS:
        raise unknown_name("shift", name, SHIFTS)
    check_options(f"shift {name!r}", SHIFTS[name], options)
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    return SHIFTS[name](source, f"{source.name}+{name}({shown})", **options)


def _turn(images, angle):
    """float32[N, H, W, C]: turned counter-clockwise by `angle` radians, bilinear, zero outside."""
    num_images, height, width, num_channels = images.shape
    down, right = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    # Where each pixel comes from, on images with a dark pixel added all around.
    row = math.cos(angle) * down + math.sin(angle) * right + (height + 1) / 2
    column = math.cos(angle) * right - math.sin(angle) * down + (width + 1) / 2
    row, column = np.clip(row, 0, height + 1).ravel(), np.clip(column, 0, width + 1).ravel()
    top, left = np.minimum(row.astype(np.int64), height), np.minimum(column.astype(np.int64), width)
    flat = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(num_images, -1, num_channels)
    turned = np.zeros((num_images, height * width, num_channels), np.float32)
    for is_low in (0, 1):
        for is_right in (0, 1):
            weight = (1 - abs(row - top - is_low)) * (1 - abs(column - left - is_right))
            corner = (top + is_low) * (width + 2) + left + is_right
            turned += weight.astype(np.float32)[None, :, None] * flat[:, corner]
    return turned.reshape(images.shape)
