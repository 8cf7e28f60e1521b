"""1,797 real handwritten digits that come with the package: the smallest honest data set.

Origin: test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak; UCI Machine Learning
Repository, id 80, CC BY 4.0), as scikit-learn (BSD-3-Clause) ships it: strokes counted in a grid of 8 x 8, 0 … 16.
`python tests/test_data_digits.py` writes assets/digits.npz again from scikit-learn's copy.
"""

import importlib.resources

import numpy as np

from jaxtune.data.arrays import ArraySource
from jaxtune.data.record_random import record_bits
from jaxtune.data.source import check_split
from jaxtune.errors import DataError

SIDE = 8  # of a stored image
TOP = 16.0  # the brightest stored value
SHARES = {"test": 0.2, "validation": 0.1}  # of every class; train is the rest


def open_digits(split: str, *, size: int = 28, margin: int = 4, class_prefix: str = "") -> ArraySource:
    """Opens a split of the handwritten digits: bright on dark, one channel.

    Args:
        split: Fixed for good, the same share of every class in each: 1,259 train, 179 validation, 359 test
            records. The writers are not recorded, so one may be in several splits.
        size: Height and width of an image, by bilinear interpolation.
        margin: Dark pixels on each side. The stored digits fill their frame from top to bottom; 4 of 28
            gives them the height and frame of MNIST's, and of the drawn glyphs'.
        class_prefix: Put before every class name.

    Raises:
        DataError: `size` without its margins is below 8.
    """
    check_split("digits", split)
    inner = size - 2 * margin
    if margin < 0 or inner < SIDE:
        raise DataError(
            f"digits: size {size} with margin {margin} leaves {inner} pixels a side, the stored images have {SIDE}. "
            f"Give size - 2 * margin of at least {SIDE}, and no negative margin."
        )
    with importlib.resources.files("jaxtune").joinpath("assets", "digits.npz").open("rb") as file:
        tables = np.load(file, allow_pickle=False)
        pixels, labels = tables["pixels"], tables["labels"]
    keep = _split_of(labels) == split
    images = _upscale(pixels[keep].astype(np.float32) / np.float32(TOP), inner)
    images = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    return ArraySource("digits", split, images, labels[keep], [f"{class_prefix}{digit}" for digit in range(10)])


def _split_of(labels):
    """str[N]: the split of each record, from its number alone."""
    order = np.argsort(record_bits(0, "digits", np.arange(len(labels)), 1)[:, 0], kind="stable")
    splits = np.full(len(labels), "train", "U10")
    for label in range(10):
        members = order[labels[order] == label]
        start = 0
        for split, share in SHARES.items():
            stop = start + round(share * len(members))
            splits[members[start:stop]] = split
            start = stop
    return splits


def _upscale(images, size):
    """Bilinear, pixels as areas (no shift of the middle), the outermost values carried on to the edge."""
    place = np.clip((np.arange(size, dtype=np.float32) + 0.5) * (SIDE / size) - 0.5, 0, SIDE - 1)
    low = np.minimum(place.astype(np.int64), SIDE - 2)
    share = place - low.astype(np.float32)
    images = images[:, low] * (1 - share)[:, None] + images[:, low + 1] * share[:, None]
    return images[:, :, low] * (1 - share) + images[:, :, low + 1] * share
