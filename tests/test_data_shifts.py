"""Shifts: what they must undo, an oracle for the turn, and where their randomness comes from."""

import math

import numpy as np
import pytest

from jaxtune.data import (
    SHIFTS,
    ArraySource,
    Loader,
    invert,
    noise,
    occlude,
    open_source,
    rotate,
    shift_source,
)
from jaxtune.errors import DataError, UnknownNameError

INDICES = np.array([5, 900, 0, 17])


def draw_batch(height=9, width=9, channels=2):
    images = np.random.default_rng(0).random((len(INDICES), height, width, channels), np.float32)
    images[images < 0.3] = 0  # paper: where an inexact turn would show
    return {"image": images, "label": np.arange(len(INDICES), dtype=np.int32)}


def test_four_quarter_turns_are_none():
    batch = draw_batch()
    turned = batch
    for _ in range(4):
        turned = rotate(degrees=90)(turned, INDICES)
        assert not np.array_equal(turned["image"], batch["image"]) or _ == 3
    np.testing.assert_array_equal(turned["image"], batch["image"], strict=True)


@pytest.mark.parametrize("degrees", [-450, -180, 0, 90, 180, 270, 360])
@pytest.mark.parametrize("shape", [(9, 9), (8, 8), (6, 9)])
def test_the_exact_turn_and_the_interpolated_one_agree(degrees, shape):
    batch = draw_batch(*shape)
    turned = rotate(degrees=degrees)(batch, INDICES)["image"]
    # Just off the exact angle every pixel is interpolated; 1e-4 degrees move the rim by 1e-5 pixels.
    nearly = rotate(degrees=degrees + 1e-4)(batch, INDICES)["image"]
    assert turned.shape == batch["image"].shape
    assert turned.dtype == np.float32
    np.testing.assert_allclose(turned, nearly, atol=1e-4)
    if shape[0] == shape[1] or degrees % 180 == 0:
        np.testing.assert_array_equal(turned, np.rot90(batch["image"], degrees // 90, axes=(1, 2)))


@pytest.mark.parametrize("degrees", [30.0, -75.5, 163.0])
def test_a_turn_equals_scipys(degrees):
    ndimage = pytest.importorskip("scipy.ndimage")
    batch = draw_batch(8, 11)
    turned = rotate(degrees=degrees)(batch, INDICES)["image"]
    expected = ndimage.rotate(
        batch["image"].astype(np.float64), degrees, axes=(2, 1), reshape=False, order=1, mode="grid-constant"
    )
    # float32 weights and sums against float64.
    np.testing.assert_allclose(turned, expected, atol=1e-5)


def test_a_turn_is_counter_clockwise():
    image = np.zeros((1, 11, 11, 1), np.float32)
    image[0, 5, 9] = 1  # to the right of the middle
    turned = rotate(degrees=45)({"image": image}, np.array([0]))["image"][0, :, :, 0]
    row, column = np.argwhere(turned == turned.max())[0]
    assert row < 5 < column


def test_inverting_twice_changes_nothing():
    batch = draw_batch()
    once = invert()(batch, INDICES)
    np.testing.assert_array_equal(once["image"], 1 - batch["image"], strict=True)
    # 1 - (1 - x) rounds to a multiple of 2**-24.
    np.testing.assert_allclose(invert()(once, INDICES)["image"], batch["image"], atol=2**-24)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_occlusion_blanks_one_square_somewhere(size):
    indices = np.arange(600)
    batch = {"image": np.ones((600, 7, 10, 1), np.float32)}
    blank = occlude(size=size)(batch, indices)["image"][..., 0] == 0
    rows, columns = blank.any(axis=2), blank.any(axis=1)
    np.testing.assert_array_equal(blank.sum(axis=(1, 2)), size * size)
    np.testing.assert_array_equal(rows.sum(axis=1), size)
    np.testing.assert_array_equal(columns.sum(axis=1), size)
    # Every place that fits comes up among 600 draws: 70 places at most.
    places = {(row.argmax(), column.argmax()) for row, column in zip(rows, columns, strict=True)}
    assert len(places) == (8 - size) * (11 - size)


def test_noise_has_its_size_and_stays_in_range():
    indices = np.arange(200)
    batch = {"image": np.full((200, 10, 10, 1), 0.5, np.float32)}
    added = noise(std=0.05)(batch, indices)["image"] - 0.5
    # 20,000 pixels: the standard error of a standard deviation is 0.5 %.
    np.testing.assert_allclose(added.std(dtype=np.float64), 0.05, rtol=0.025)
    loud = noise(std=5.0)(batch, indices)["image"]
    assert loud.min() == 0
    assert loud.max() == 1
    np.testing.assert_array_equal(noise(std=0.0)(batch, indices)["image"], batch["image"])


@pytest.mark.parametrize("make", [lambda seed: occlude(size=3, seed=seed), lambda seed: noise(std=0.2, seed=seed)])
def test_random_shifts_belong_to_the_record(make):
    batch, order = draw_batch(), np.array([2, 0, 3, 1])
    shifted = make(1)(batch, INDICES)
    again = make(1)({key: values[order] for key, values in batch.items()}, INDICES[order])
    for key in batch:
        np.testing.assert_array_equal(again[key], shifted[key][order], strict=True)
    assert not np.array_equal(make(2)(batch, INDICES)["image"], shifted["image"])
    assert not np.array_equal(make(1)(batch, INDICES + 1)["image"], shifted["image"])


def test_maps_leave_their_input_alone():
    for change in (rotate(degrees=90), rotate(degrees=33), invert(), occlude(size=2), noise(std=0.1)):
        batch = draw_batch()
        change(batch, INDICES)["image"][:] = 7
        np.testing.assert_array_equal(batch["image"], draw_batch()["image"])


def test_a_label_subset_keeps_labels_and_names():
    digits = open_source("digits", "test")
    subset = shift_source(digits, "label_subset", classes=("7", "2"))
    labels = digits.__getitems__(np.arange(len(digits)))["label"]
    kept = np.flatnonzero((labels == 7) | (labels == 2))
    ours, theirs = subset.__getitems__(np.arange(len(subset))), digits.__getitems__(kept)
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key], strict=True)
    assert subset.class_names == digits.class_names
    with pytest.raises(UnknownNameError, match=r"class of digits 'seven'.*0, 1, 2"):
        shift_source(digits, "label_subset", classes=("seven",))
    with pytest.raises(DataError, match=r"no record is of the classes \[\]"):
        shift_source(digits, "label_subset", classes=())


def test_a_shifted_source_equals_maps_in_the_loader():
    digits = open_source("digits", "validation")
    shifted = shift_source(shift_source(digits, "rotate", degrees=17.0), "occlude", size=6, seed=3)
    assert shifted.name == "digits+rotate(degrees=17.0)+occlude(size=6, seed=3)"
    maps = (rotate(degrees=17.0), occlude(size=6, seed=3))
    for ours, theirs in zip(
        Loader(shifted, 50, seed=1, num_epochs=1), Loader(digits, 50, seed=1, num_epochs=1, maps=maps), strict=True
    ):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])


def test_shifts_are_known_by_name():
    digits = open_source("digits", "test")
    assert set(SHIFTS) == {"rotate", "invert", "occlude", "noise", "label_subset"}
    with pytest.raises(UnknownNameError, match=r"shift 'rotation'.*Did you mean 'rotate'.*Known: invert, label_subset"):
        shift_source(digits, "rotation", degrees=3)
    with pytest.raises(UnknownNameError, match=r"option of shift 'rotate' 'angle'.*Known: degrees"):
        shift_source(digits, "rotate", angle=3)
    with pytest.raises(UnknownNameError, match=r"option of shift 'invert' 'std'.*\(none\)"):
        shift_source(digits, "invert", std=3)
    with pytest.raises(DataError, match="shift 'occlude' needs size"):
        shift_source(digits, "occlude", seed=3)


def test_options_out_of_range_are_refused():
    for make in (lambda: occlude(size=0), lambda: noise(std=-0.1), lambda: noise(std=math.nan)):
        with pytest.raises(DataError, match="must"):
            make()
    with pytest.raises(DataError, match="a square of 8 pixels does not fit into images of 7x9"):
        occlude(size=8)(draw_batch(7, 9), INDICES)


def test_a_subset_of_a_single_class_source():
    source = ArraySource("one", "train", np.zeros((3, 2, 2), np.uint8), np.zeros(3, int), ["only"])
    assert len(shift_source(source, "label_subset", classes=("only",))) == 3
