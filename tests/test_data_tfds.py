"""Prepared TensorFlow Datasets in their real on-disk form, written and read without TensorFlow."""

import builtins
import io
import sys
import tempfile

import numpy as np
import pytest

from jaxtune.data import SPLITS, Loader, open_source
from jaxtune.errors import DataError, UnknownNameError

tfds = pytest.importorskip("tensorflow_datasets")
pil = pytest.importorskip("PIL.Image")
pytest.importorskip("array_record")

NAMES = ("ant", "bee", "cat")
NUM_TRAIN, NUM_TEST = 20, 7


def picture_of(number, side=6):
    return np.random.default_rng(number).integers(0, 256, (side, 5, 3), np.uint8)


class SmallInsects(tfds.core.GeneratorBasedBuilder):
    """Twenty records to train on and seven to test on."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = {"train": range(NUM_TRAIN), "test": range(NUM_TRAIN, NUM_TRAIN + NUM_TEST)}  # noqa: RUF012
    IMAGE_SHAPE = (None, 5, 3)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=self.IMAGE_SHAPE),
            "label": tfds.features.ClassLabel(names=NAMES),
            "number": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {split: self._generate_examples(numbers) for split, numbers in self.SPLITS.items()}

    def _generate_examples(self, numbers):
        for number in numbers:
            file = io.BytesIO()  # encoded here: TFDS would encode an array by TensorFlow
            pil.fromarray(picture_of(number, self.side_of(number))).save(file, "PNG")
            file.seek(0)
            yield number, {"image": file, "label": number % 3, "number": number}

    def side_of(self, _):
        return 6


class SmallInsectsWithVal(SmallInsects):
    SPLITS = {"train": range(4), "validation": range(4, 7), "test": range(7, 9)}  # noqa: RUF012


class SmallInsectsOfManySizes(SmallInsects):
    def side_of(self, number):
        return 4 + number


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("scratch")))  # TFDS leaves folders behind
        for builder in (SmallInsects, SmallInsectsWithVal, SmallInsectsOfManySizes):
            builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def opener(data_dir):
    return lambda split, name="small_insects", **options: open_source(
        f"tfds:{name}", split, data_dir=data_dir, **options
    )


def pictures(source):
    return np.rint(source.__getitems__(np.arange(len(source)))["image"] * 255).astype(np.uint8)


def test_records_come_back_as_they_were_written(opener):
    source = opener("test")
    assert (source.name, source.split, source.class_names) == ("tfds:small_insects", "test", NAMES)
    batch = source.__getitems__(np.arange(NUM_TEST))
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32
    written = {picture_of(n).tobytes(): n % 3 for n in range(NUM_TRAIN, NUM_TRAIN + NUM_TEST)}  # TFDS shuffles
    found = {image.tobytes(): label for image, label in zip(pictures(source), batch["label"], strict=True)}
    assert found == written
    assert source[3]["image"].shape == (6, 5, 3)
    assert source[3]["label"] == batch["label"][3]
    assert opener("test", class_prefix="in/").class_names == ("in/ant", "in/bee", "in/cat")
    with pytest.raises(IndexError, match="it has 7 records"):
        source[7]


def test_a_missing_validation_split_is_cut_from_train(opener):
    train, held = (pictures(opener(split, validation_fraction=0.25)) for split in ("train", "validation"))
    assert (len(train), len(held)) == (15, 5)
    found = {image.tobytes() for image in np.concatenate([train, held])}
    assert found == {picture_of(n).tobytes() for n in range(NUM_TRAIN)}
    assert len(opener("train", validation_fraction=0.0)) == 20
    with pytest.raises(DataError, match=r"of 0.0 of 20 train records leaves none"):
        opener("validation", validation_fraction=0.0)


def test_a_validation_split_of_its_own_is_used(opener):
    assert [len(opener(split, "small_insects_with_val", validation_fraction=0.5)) for split in SPLITS] == [4, 3, 2]


def test_it_loads_in_batches(opener):
    loader = Loader(opener("train"), 6, seed=0, num_epochs=1)
    assert [batch["image"].shape for batch in loader] == [(6, 6, 5, 3)] * 3


def test_images_of_many_sizes_are_refused(opener):
    source = opener("train", "small_insects_of_many_sizes")
    assert source[0]["image"].shape[1:] == (5, 3)
    with pytest.raises(DataError, match="images of 2 shapes in one batch"):
        source.__getitems__([0, 1])


def test_other_features_by_name(opener):
    with pytest.raises(UnknownNameError, match=r"feature of tfds:small_insects 'picture'.*image, label, number"):
        opener("train", image_key="picture")
    with pytest.raises(DataError, match=r"feature 'number' is .*expected a ClassLabel"):
        opener("train", label_key="number")
    with pytest.raises(DataError, match=r"feature 'number' is .*expected a uint8 Image"):
        opener("train", image_key="number")


def test_what_is_not_prepared_says_how_to(opener, data_dir):
    with pytest.raises(DataError, match=r"not prepared under .*tfds build mnist --file_format=array_record"):
        opener("train", "mnist")
    info = data_dir / "small_insects_with_val" / "1.0.0" / "dataset_info.json"
    text = info.read_text()
    info.write_text(text.replace("array_record", "tfrecord"))
    try:
        with pytest.raises(DataError, match=r"prepared as tfrecord in .*--out_file_format=array_record"):
            opener("train", "small_insects_with_val")
    finally:
        info.write_text(text)


def test_tensorflow_is_never_imported(opener):
    assert len(opener("train")[0]) == 2
    assert "tensorflow" not in sys.modules


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "tensorflow_datasets":
            raise ImportError("No module named 'tensorflow_datasets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"pip install 'jaxtune\[tfds\]'"):
        open_source("tfds:mnist", "train")
