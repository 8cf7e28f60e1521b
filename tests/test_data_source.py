"""Opening by name, and what every source promises."""

from pathlib import Path

import numpy as np
import pytest

from jaxtune.data import SHIFTS, SPLITS, DataSource, open_source, shift_source
from jaxtune.data.source import NAMED
from jaxtune.errors import DataError, UnknownNameError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "vision" / "open"
OPTIONS = {
    "digits": {},
    "glyphs": {"num_records": 300, "classes": "07Ab", "fonts": ("DejaVuSans.ttf", "cmr10.ttf")},
    "npz": {},
}
SHIFT_OPTIONS = {
    "rotate": {"degrees": 20},
    "invert": {},
    "occlude": {"size": 5},
    "noise": {"std": 0.3},
    "label_subset": {"classes": ("0", "7")},
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    draw = np.random.default_rng(0)
    tables = {}
    for split, count in (("train", 80), ("test", 23)):
        tables[f"{split}_x"] = draw.integers(0, 256, (count, 9, 11), np.uint8)
        tables[f"{split}_y"] = np.arange(count, dtype=np.int32) % 8
    np.savez(path, **tables)
    return path


@pytest.fixture(params=[*NAMED, "npz", *SHIFTS])
def opener(request, npz):
    """(split, class_prefix) -> source, for every kind of source and every shift of one."""
    kind = request.param
    if kind in SHIFTS:
        return lambda split: shift_source(open_source("digits", split), kind, **SHIFT_OPTIONS[kind])
    name = npz if kind == "npz" else kind
    return lambda split: open_source(name, split, **OPTIONS[kind])


@pytest.mark.parametrize("split", SPLITS)
def test_every_source_keeps_the_protocol(opener, split):
    source = opener(split)
    assert isinstance(source, DataSource)
    assert source.split == split
    indices = [4, 0, len(source) - 1, 4]
    batch = source.__getitems__(indices)
    assert set(batch) == {"image", "label"}
    assert (batch["image"].dtype, batch["image"].ndim, batch["label"].dtype) == (np.float32, 4, np.int32)
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1
    assert all(0 <= label < len(source.class_names) for label in batch["label"])
    for row, index in enumerate(indices):  # the same bits alone, in a batch, and from a source opened anew
        for again in (source[index], opener(split)[np.int64(index)]):
            np.testing.assert_array_equal(again["image"], batch["image"][row], strict=True)
            np.testing.assert_array_equal(again["label"], batch["label"][row])
            assert again["label"].dtype == np.int32
            assert again["label"].shape == ()


def test_splits_have_no_record_in_common(opener):
    rows = [{image.tobytes() for image in _all_images(opener(split))} for split in SPLITS]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_an_index_outside_is_refused(opener):
    source = opener("test")
    for bad in (-1, len(source)):
        with pytest.raises(IndexError, match=f"it has {len(source)} records"):
            source[bad]
    assert sum(1 for _ in source) == len(source)  # Python's own iteration ends by it


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_prefix_qualifies_the_class_names(kind, npz):
    name = npz if kind == "npz" else kind
    plain = open_source(name, "test", **OPTIONS[kind])
    qualified = open_source(name, "test", class_prefix="set/", **OPTIONS[kind])
    assert qualified.class_names == tuple(f"set/{c}" for c in plain.class_names)


def test_unknown_names_list_the_known():
    with pytest.raises(UnknownNameError, match=r"'digit'.*Did you mean 'digits'.*<path>\.npz.*glyphs"):
        open_source("digit", "train")
    with pytest.raises(UnknownNameError, match=r"split of digits 'valid'.*test, train, validation"):
        open_source("digits", "valid")
    with pytest.raises(UnknownNameError, match=r"option of data source 'glyphs' 'sise'.*Did you mean 'size'"):
        open_source("glyphs", "train", sise=3)
    with pytest.raises(UnknownNameError, match=r"option of data source '\.npz'.*validation_fraction"):
        open_source("a.npz", "train", fraction=3)
    with pytest.raises(UnknownNameError, match=r"option of data source 'tfds:'.*data_dir"):
        open_source("tfds:mnist", "train", dir=3)
    with pytest.raises(DataError, match=r"nowhere\.npz: cannot be opened \(No such file"):
        open_source("nowhere.npz", "train")


def test_every_shared_file_opens():
    if not SHARED.is_dir():
        pytest.skip(f"the shared data sets are not at {SHARED}")
    paths = sorted(SHARED.glob("*.npz"))
    assert len(paths) >= 16
    for path in paths:
        held = open_source(path, "validation")
        assert held.name == path.stem
        assert len(held) > 0
        assert held[0]["image"].shape == (28, 28, 1)


def _all_images(source):
    return source.__getitems__(np.arange(len(source)))["image"]
