"""The digits that come with the package. Run as a program, this writes assets/digits.npz from scikit-learn's copy."""

from pathlib import Path

import numpy as np
import pytest

from jaxtune.data import SPLITS, open_source
from jaxtune.errors import DataError

ASSET = Path(__file__).parents[1] / "jaxtune" / "assets" / "digits.npz"


def write_asset():
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez_compressed(ASSET, pixels=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))


def everything(**options):
    parts = [open_source("digits", split, **options) for split in SPLITS]
    batches = [part.__getitems__(np.arange(len(part))) for part in parts]
    return tuple(np.concatenate([batch[key] for batch in batches]) for key in ("image", "label"))


def test_the_splits_are_scikit_learns_digits():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = everything(size=8, margin=0)
    theirs = load_digits()
    ours = sorted(zip((images[..., 0] * 16).reshape(-1, 64).tolist(), labels.tolist(), strict=True))
    assert ours == sorted(zip(theirs.data.tolist(), theirs.target.tolist(), strict=True))


def test_every_split_holds_its_share_of_every_class():
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        source = open_source("digits", split)
        counts = np.bincount(source.__getitems__(np.arange(len(source)))["label"], minlength=10)
        # 174 to 183 records of a class; each split is rounded to whole ones.
        assert np.abs(counts - share * 179.7).max() <= 0.7 * 5.7 + 1, split
        assert source.class_names == tuple("0123456789")


def test_upscaling_equals_an_independent_bilinear_zoom():
    ndimage = pytest.importorskip("scipy.ndimage")
    small, _ = everything(size=8, margin=0)
    large, _ = everything(size=26, margin=3)
    zoomed = ndimage.zoom(small[:50, :, :, 0], (1, 2.5, 2.5), order=1, mode="nearest", grid_mode=True)
    # float32 against float64.
    np.testing.assert_allclose(large[:50, 3:-3, 3:-3, 0], zoomed, atol=1e-6)
    assert large[:, :3].max() == large[:, -3:].max() == large[:, :, :3].max() == large[:, :, -3:].max() == 0


def test_a_frame_too_small_is_refused():
    with pytest.raises(DataError, match="size 8 with margin 4 leaves 0 pixels"):
        open_source("digits", "train", size=8)
    with pytest.raises(DataError, match="no negative margin"):
        open_source("digits", "train", margin=-1)


def test_the_file_stays_small():
    assert ASSET.stat().st_size < 100_000


if __name__ == "__main__":
    write_asset()
