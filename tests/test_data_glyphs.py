"""Glyphs drawn from fonts: the right ones, like handwriting, and the same bits however they are asked for."""

import builtins
import itertools
import string

import numpy as np
import pytest

from jaxtune.data import open_source
from jaxtune.data.glyph_atlas import CELLS, FONTS, GLYPH_CELLS, make_atlas, thin
from jaxtune.data.glyphs import MAX_WARP, _sample
from jaxtune.errors import DataError

SANS = ("DejaVuSans.ttf",)


def open_few(split="train", **options):
    return open_source("glyphs", split, **{"classes": "038AQ", "fonts": FONTS[::5], **options})


def test_the_bits_do_not_depend_on_the_batch():
    source = open_few(num_records=400)
    whole = source.__getitems__(np.arange(400))
    order = np.random.default_rng(0).permutation(400)
    for size in (1, 3, 7, 64, 129):
        for start in range(0, 400 - size, 97):
            picked = order[start : start + size]
            batch = source.__getitems__(picked)
            np.testing.assert_array_equal(batch["image"], whole["image"][picked])
            np.testing.assert_array_equal(batch["label"], whole["label"][picked])
    longer = open_few(num_records=10**12)
    np.testing.assert_array_equal(longer.__getitems__(np.arange(400))["image"], whole["image"])
    assert longer[10**12 - 1]["image"].max() > 0.5


def test_seeds_and_splits_draw_differently():
    images = [
        open_few(split, seed=seed)[3]["image"]
        for split, seed in (("train", 0), ("train", 1), ("validation", 0), ("test", 0))
    ]
    for i, one in enumerate(images):
        # Another glyph, not only other noise.
        assert all(np.abs(one - other).mean() > 0.05 for other in images[:i])


def test_labels_go_round():
    source = open_few()
    assert source.class_names == ("0", "3", "8", "A", "Q")
    np.testing.assert_array_equal(source.__getitems__(np.arange(50))["label"], np.arange(50) % 5)


def test_without_warp_a_glyph_is_the_fonts_own():
    """Against Pillow drawing the same characters straight into the frame."""
    pil, matplotlib = pytest.importorskip("PIL.Image"), pytest.importorskip("matplotlib")
    from PIL import ImageDraw, ImageFont

    source = open_source("glyphs", "train", classes="2EgW", fonts=SANS, warp=0.0, num_records=80)
    batch = source.__getitems__(np.arange(80))
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{SANS[0]}", 400)
    for label, character in enumerate("2EgW"):
        picture = pil.new("L", (1200, 1200))
        ImageDraw.Draw(picture).text((300, 300), character, font=font, fill=255)
        picture = picture.crop(picture.getbbox())
        longer = max(picture.size)
        frame = pil.new("L", (round(longer * 28 / 18.8),) * 2)
        frame.paste(picture, tuple((frame.width - side) // 2 for side in picture.size))
        expected = np.asarray(frame.resize((28, 28), pil.Resampling.BOX)) / 255
        images = np.unique(batch["image"][batch["label"] == label, :, :, 0], axis=0)
        assert len(images) == 2  # print and pen: nothing else varies
        alike = [np.corrcoef(image.ravel(), expected.ravel())[0, 1] for image in images]
        # The print entry; edges are softer than a box filter's, hence not 1.
        assert max(alike) > 0.93, character
        assert min(alike) > 0.7, character


def test_glyphs_fill_the_frame_as_handwritten_digits_do():
    images = open_source("glyphs", "train", classes=string.digits).__getitems__(np.arange(500))["image"][..., 0]
    ink = images > 0.4
    assert ink.any(axis=(1, 2)).all()  # no empty picture
    heights = ink.any(axis=2).sum(axis=1)
    assert 15 < np.median(heights) < 23
    assert heights.min() > 8
    place = np.arange(28) - 13.5
    centre = (images.sum(axis=1) * place).sum(axis=1) / images.sum(axis=(1, 2))
    assert abs(centre.mean()) < 0.5
    assert 0.5 < centre.std() < 3
    assert 0.05 < images.mean() < 0.25  # bright on dark; MNIST: 0.13
    border = np.concatenate([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], axis=1)
    assert border.any(axis=1).mean() < 0.2  # few are cut off; not even all of these are


def test_warp_makes_a_class_vary_and_keeps_it_apart():
    def spread(warp):
        images = open_few(classes="0", fonts=SANS, warp=warp).__getitems__(np.arange(200))["image"]
        return images.std(axis=0).mean()

    spreads = [spread(warp) for warp in (0.0, 0.5, 1.0, MAX_WARP)]
    assert all(more > less for less, more in itertools.pairwise(spreads))
    # A class is told from another by its nearest neighbour among 1,000 others. Chance is 0.1; pixels of
    # handwriting that has not been centred compare badly, a small network reads 0.98 of these digits.
    source = open_source("glyphs", "train", classes=string.digits)
    known, asked = source.__getitems__(np.arange(1000)), source.__getitems__(np.arange(1000, 1100))
    apart = np.square(asked["image"][:, None] - known["image"][None]).sum(axis=(2, 3, 4))
    assert np.mean(known["label"][apart.argmin(axis=1)] == asked["label"]) > 0.5


def test_fields_are_read_bilinearly():
    ndimage = pytest.importorskip("scipy.ndimage")
    draw = np.random.default_rng(0)
    fields = draw.normal(size=(3, CELLS, CELLS)).astype(np.float32)
    entries = np.array([2, 0, 2, 1])
    x, y = draw.uniform(-5, CELLS + 5, (2, 4, 10, 10)).astype(np.float32)
    found = _sample(fields, entries, x, y)
    for i, entry in enumerate(entries):
        # Beyond the field its border goes on. Weights of float32 places, and the last cell begins at 62.999.
        expected = ndimage.map_coordinates(fields[entry], [y[i], x[i]], order=1, mode="nearest")
        np.testing.assert_allclose(found[i], expected, atol=1e-2)


def test_any_size():
    for size in (8, 32, 61):
        images = open_few(size=size, warp=0.3).__getitems__(np.arange(20))["image"]
        assert images.shape == (20, size, size, 1)
        height = (images[..., 0] > 0.4).any(axis=2).sum(axis=1).mean()
        assert 0.55 < height / size < 0.9


def test_fonts_without_the_glyph_are_left_out():
    # LastResort has one picture for all letters, cmex10 draws symbols, STIXSiz* nothing, Display has few.
    empty = ("LastResortHE-Regular.ttf", "STIXSizOneSymReg.ttf", "DejaVuSansDisplay.ttf")
    atlas = make_atlas(("A", "3"), (*SANS, *empty))
    np.testing.assert_array_equal(atlas.count, [2, 2])  # print and pen of the one font that has them
    with pytest.raises(DataError, match=r"none of 3 fonts has the character 'A'"):
        make_atlas(("A",), empty)
    # STIXGeneral has no Kanji; DejaVu shows a box for it.
    with pytest.raises(DataError, match="none of 2 fonts has the character '漢'"):
        make_atlas(("漢",), ("STIXGeneral.ttf", *SANS))


def test_every_default_font_has_every_letter_and_digit():
    characters = tuple(string.digits + string.ascii_letters)
    assert (make_atlas(characters, FONTS).count == 2 * len(FONTS)).all()


def test_fields_are_signed_distances():
    atlas = make_atlas(("L", "o"), SANS)
    for entry, field in enumerate(atlas.fields):
        steepness = np.hypot(*np.gradient(field))
        assert steepness.max() < 1.5  # a distance never rises faster than one per cell, but for rounding
        rows = np.flatnonzero((field > -0.6).any(axis=1))
        # Centred, as tall as it should be; a centre line ends half a stroke earlier.
        assert abs(rows[0] + rows[-1] - (CELLS - 1)) <= 6
        assert GLYPH_CELLS - (14 if atlas.is_pen[entry] else 2) <= rows[-1] - rows[0] + 1 <= GLYPH_CELLS + 2


def test_thinning_keeps_holes_and_parts_and_is_thin():
    ndimage = pytest.importorskip("scipy.ndimage")
    shape = np.zeros((3, 40, 40), bool)
    shape[0, 5:12, 3:37] = True  # a bar
    shape[1, 5:35, 5:35] = True
    shape[1, 12:28, 12:28] = False  # a ring
    shape[2, 4:20, 4:9] = shape[2, 25:38, 20:38] = True  # two parts
    lines = thin(shape)
    assert not (lines & ~shape).any()
    for before, after in zip(shape, lines, strict=True):
        for ink, structure in ((True, np.ones((3, 3))), (False, None)):
            parts = [ndimage.label(mask == ink, structure)[1] for mask in (before, after)]
            assert parts[0] == parts[1]
        assert not ndimage.binary_erosion(after, np.ones((2, 2))).any()  # nowhere two by two
    np.testing.assert_array_equal(thin(lines), lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "AA"}, "different single characters"),
        ({"classes": ("A", "BC")}, "different single characters"),
        ({"classes": ""}, "different single characters"),
        ({"classes": "A "}, "different single characters"),
        ({"size": 4}, "size must be 8 or more, got 4"),
        ({"num_records": 0}, "num_records must be 1 or more"),
        ({"warp": 3.0}, "warp must be between 0 and 1.5, got 3.0"),
        ({"warp": float("nan")}, "warp must be"),
        ({"fonts": ()}, "at least one font"),
        ({"fonts": ("Nothing.ttf",)}, "looked up among matplotlib's fonts"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        open_few(**options)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"pip install 'jaxtune\[report\]'"):
        open_few(classes="xyz")  # not in the cache of another test
