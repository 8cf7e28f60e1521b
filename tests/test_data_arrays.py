"""Archives of arrays: every layout that is read, the cut of a validation split, and every way to be refused."""

import io
import pickle
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtune import sampling
from jaxtune.data import SPLITS, ArraySource, open_npz
from jaxtune.errors import DataError
from jaxtune.models import mlp, registry

SHARED = Path(__file__).parents[2] / "shared" / "data" / "vision" / "open"
NAMES = np.array(["ant", "bee", "cat"])


def tables(num_train=60, num_test=9, **more):
    """A file's content in which every image is told apart by its pixels."""
    count = num_train + num_test
    images = np.arange(count * 12).reshape(count, 3, 4).astype(np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
    labels = (np.arange(count) % 3).astype(np.int32)
    return {
        "train_x": images[:num_train],
        "train_y": labels[:num_train],
        "test_x": images[num_train:],
        "test_y": labels[num_train:],
        "class_names": NAMES,
        **more,
    }


@pytest.fixture
def save(tmp_path):
    def save_tables(content):
        path = tmp_path / "insects.npz"
        np.savez_compressed(path, **content)
        return path

    return save_tables


def numbers_of(source):
    """Which records a split holds, read off their pixels."""
    images = source.__getitems__(np.arange(len(source)))["image"]
    return np.rint(images[:, 0, 0, 0] * 255) * 256 + np.rint(images[:, 0, 1, 0] * 255)


def test_bytes_become_floats_and_labels_keep_their_names(save):
    content = tables()
    source = open_npz(save(content), "test")
    assert (source.name, source.split, source.class_names, len(source)) == ("insects", "test", tuple(NAMES), 9)
    batch = source.__getitems__([2, 5])
    np.testing.assert_array_equal(batch["image"][..., 0], content["test_x"][[2, 5]] / np.float32(255), strict=True)
    np.testing.assert_array_equal(batch["label"], content["test_y"][[2, 5]], strict=True)


@pytest.mark.parametrize(
    "layout",
    ["{split}_x {split}_y", "x_{split} y_{split}", "{split}_images {split}_labels", "images_{split} labels_{split}"],
)
@pytest.mark.parametrize("validation", [None, "validation", "val"])
def test_layouts_of_keras_medmnist_and_ours(save, layout, validation):
    content, image_key, label_key = tables(), *layout.split()
    written = {}
    for split, theirs in (("train", "train"), ("test", "test"), *([("test", validation)] if validation else [])):
        written[image_key.format(split=theirs)] = content[f"{split}_x"]
        written[label_key.format(split=theirs)] = content[f"{split}_y"][:, None]  # as MedMNIST has them
    path = save(written)
    assert open_npz(path, "test").class_names == ("0", "1", "2")
    assert len(open_npz(path, "validation")) == (9 if validation else 6)
    assert len(open_npz(path, "train")) == (60 if validation else 54)


def test_channels_and_floats_pass_through(save):
    draw = np.random.default_rng(0)
    images = draw.random((6, 5, 4, 3))
    source = open_npz(save({"test_x": images, "test_y": np.arange(6) % 2}), "test")
    np.testing.assert_array_equal(source[3]["image"], images[3].astype(np.float32), strict=True)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_the_cut_takes_every_class_in_its_share(save, fraction):
    labels = np.repeat([0, 1, 2, 3], [100, 41, 2, 1]).astype(np.int32)
    path = save(tables(num_train=144, train_y=labels, class_names=np.array(["ant", "bee", "cat", "dog"])))
    train, held = (open_npz(path, split, validation_fraction=fraction) for split in ("train", "validation"))
    np.testing.assert_array_equal(np.sort(np.concatenate([numbers_of(train), numbers_of(held)])), np.arange(144))
    counts = np.bincount(labels[numbers_of(held).astype(int)], minlength=4)
    np.testing.assert_array_equal(counts, [round(100 * fraction), round(41 * fraction), 1, 0])
    again = open_npz(path, "validation", validation_fraction=fraction)
    other = open_npz(path, "validation", validation_fraction=fraction, seed=1)
    np.testing.assert_array_equal(numbers_of(again), numbers_of(held))
    assert not np.array_equal(numbers_of(other), numbers_of(held))
    np.testing.assert_array_equal(numbers_of(open_npz(path, "test")), np.arange(144, 153))


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.99])
def test_the_cut_keeps_groups_whole(save, fraction):
    groups = np.random.default_rng(0).integers(0, 12, 200).astype(np.int32) * 7
    path = save(tables(num_train=200, train_group=groups))
    train, held = (open_npz(path, split, validation_fraction=fraction) for split in ("train", "validation"))
    ours, theirs = (set(groups[numbers_of(source).astype(int)]) for source in (train, held))
    assert not ours & theirs
    assert ours | theirs == set(groups)
    assert len(train) + len(held) == 200
    if fraction == 0.99:
        assert len(ours) == 1
    else:
        assert abs(len(held) - fraction * 200) <= np.bincount(groups).max() / 2


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 10), (0.14, 10), (0.16, 20), (0.3, 30), (0.96, 90)])
def test_the_cut_comes_as_near_as_whole_groups_can(save, fraction, count):
    path = save(tables(num_train=100, train_group=np.arange(100) % 10))
    assert len(open_npz(path, "validation", validation_fraction=fraction)) == count


def test_a_fraction_of_zero_leaves_train_whole(save):
    path = save(tables())
    assert len(open_npz(path, "train", validation_fraction=0.0)) == 60
    with pytest.raises(DataError, match=r"validation_fraction of 0.0 of 60 train records leaves none"):
        open_npz(path, "validation", validation_fraction=0.0)
    with pytest.raises(DataError, match=r"must be in \[0, 1\), got 1.0"):
        open_npz(path, "train", validation_fraction=1.0)
    with pytest.raises(DataError, match="with groups there must be two"):
        open_npz(save(tables(train_group=np.zeros(60, int))), "validation")


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", {"train_y": np.full(60, 3, np.int32)}, r"insects\.npz: .*labels run from 3 to 3, .* 3 class names"),
        ("train", {"train_y": np.full(60, -1, np.int32)}, "labels run from -1 to -1"),
        ("train", {"train_y": np.zeros(59, np.int32)}, "60 images but 59 labels"),
        ("train", {"train_y": np.zeros(60, np.float32)}, r"labels are float32\[60\], expected integers"),
        ("train", {"train_y": np.zeros((60, 3), int)}, r"labels are int64\[60, 3\]"),
        ("train", {"train_x": np.zeros((60, 12), np.uint8)}, r"images are uint8\[60, 12\], expected \[N, H, W\]"),
        ("train", {"train_x": np.zeros((60, 3, 8, 8), np.uint8)}, r"\[60, 3, 8, 8\].*Move the channels to the end"),
        ("train", {"train_x": np.zeros((60, 0, 4), np.uint8)}, "expected"),
        ("train", {"train_x": np.zeros((60, 3, 4), np.int16)}, "images are int16, expected uint8"),
        ("train", {"train_x": np.full((60, 3, 4), 2.0)}, r"must lie in \[0, 1\], found 2 to 2.*Divide"),
        ("train", {"train_x": np.full((60, 3, 4), np.nan)}, "720 of 720 pixels are NaN or Inf"),
        ("test", {"test_x": np.zeros((0, 3, 4), np.uint8), "test_y": np.zeros(0, int)}, "there are no records"),
        ("test", {"class_names": np.array(["a", "b", "a"])}, "class names must differ, repeated: a"),
        ("test", {"class_names": np.arange(3)}, r"class_names is int64\[3\], expected a list of text"),
        ("train", {"train_group": np.zeros(3, int)}, r"groups are int64\[3\], expected integers \[60\]"),
        ("train", {"x_train": np.zeros(3)}, "'train_x' and 'x_train' are both the train images"),
        ("train", {"train_x": np.array([{"a": 1}] * 60)}, "'train_x' cannot be read.*never unpickled"),
        ("train", {"class_names": np.array(["a", "b", "c"], object)}, "'class_names' cannot be read.*never unpickled"),
    ],
)
def test_what_does_not_fit_is_refused(save, split, change, message):
    with pytest.raises(DataError, match=message):
        open_npz(save(tables(**change)), split)


def test_missing_splits_and_foreign_keys_list_what_is_there(save):
    content = tables()
    path = save({key: content[key] for key in ("train_x", "train_y")})
    with pytest.raises(DataError, match=r"no test split in it, only train\. Ask for .*split=train"):
        open_npz(path, "test")
    with pytest.raises(DataError, match=r"no split found\. Keys: x, y\. Expected train_x"):
        open_npz(save({"x": content["train_x"], "y": content["train_y"]}), "train")


def test_labels_that_are_no_classes_need_names(save):
    content = tables(test_y=np.full(9, 2**40))
    del content["class_names"]
    with pytest.raises(DataError, match=f"69 labels reach up to {2**40}; save class_names"):
        open_npz(save(content), "test")


class Trap:
    """Unpickled, it would end the test run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "trap.npz"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"no \.npz archive"):
        open_npz(path, "test")
    member = io.BytesIO()
    np.lib.format.write_array(member, np.array([Trap()], object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("test_x.npy", member.getvalue())
        file.writestr("test_y.npy", member.getvalue())
    with pytest.raises(DataError, match="never unpickled"):
        open_npz(path, "test")


def test_hostile_archives_are_refused(tmp_path):
    path = tmp_path / "odd.npz"
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").rename(path)
    with pytest.raises(DataError, match="holds a single array"):
        open_npz(path, "test")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("test_x", b"text")
        file.writestr("test_y", b"text")
    with pytest.raises(DataError, match="'test_y' is no array"):
        open_npz(path, "test")
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (2**50, 28, 28)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("test_x.npy", member.getvalue())
        file.writestr("test_y.npy", member.getvalue())
        file.writestr("class_names.npy", member.getvalue())
    with pytest.raises(DataError, match="cannot be read"):
        open_npz(path, "test")


def test_a_damaged_file_is_refused_wherever_it_is_damaged(save):
    path = save(tables())
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"insects\.npz"):
            open_npz(path, "train")
    refused = 0
    for place in range(0, len(whole), 17):  # a flipped byte: refused, or of no consequence
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            assert open_npz(path, "test")[0]["image"].shape == (3, 4, 1)
        except DataError:
            refused += 1
    assert refused > 20


def test_arrays_in_memory_are_a_source_too():
    content = tables()
    source = ArraySource("mine", "train", content["train_x"], content["train_y"], NAMES.tolist())
    assert source[7]["label"] == 1
    with pytest.raises(DataError, match=r"mine \(train\): labels run from 0 to 2, but there are 2 class names"):
        ArraySource("mine", "train", content["train_x"], content["train_y"], ["a", "b"])


@pytest.mark.parametrize("name", ["mnist", "thai_digits", "omniglot_latin"])
def test_shared_sets_are_cut_by_writer_or_class(name):
    path = SHARED / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"the shared data sets are not at {SHARED}")
    with np.load(path) as file:
        content = dict(file)
    sources = {split: open_npz(path, split) for split in SPLITS}
    count = len(content["train_x"])
    assert len(sources["train"]) + len(sources["validation"]) == count
    np.testing.assert_allclose(len(sources["validation"]), count / 10, atol=0.04 * count)
    np.testing.assert_array_equal(
        sources["test"].__getitems__(np.arange(100))["image"][..., 0], content["test_x"][:100] / np.float32(255)
    )
    if "train_group" in content:
        pixels = [image.tobytes() for image in content["train_x"]]
        group_of = dict(zip(pixels, content["train_group"].tolist(), strict=True))
        groups = []
        for source in (sources["train"], sources["validation"]):
            images = np.rint(source.__getitems__(np.arange(len(source)))["image"][..., 0] * 255).astype(np.uint8)
            groups.append({group_of[image.tobytes()] for image in images})
        assert not groups[0] & groups[1]


def test_images_without_labels_are_a_source_where_the_caller_says_so(save):
    content = tables(20, 6)
    path = save({"train_x": content["train_x"]})
    with pytest.raises(DataError, match=r"insects\.npz: images of train without labels"):
        open_npz(path, "train")
    with pytest.raises(DataError, match="no test split in it, only train"):
        open_npz(path, "test")
    train, held = (open_npz(path, split, allow_unlabelled=True) for split in ("train", "validation"))
    assert (len(train), len(held), train.class_names) == (18, 2, ())
    assert set(train[0]) == {"image"}
    assert sorted([*numbers_of(train), *numbers_of(held)]) == list(range(20))
    with pytest.raises(DataError, match="no test split in it, only train"):
        open_npz(path, "test", allow_unlabelled=True)
    both = save({**content, "extra": NAMES})
    np.testing.assert_array_equal(open_npz(both, "test", allow_unlabelled=True)[0]["label"], content["test_y"][0])
    half = save({"train_x": content["train_x"], "test_x": content["test_x"], "test_y": content["test_y"]})
    assert "label" not in open_npz(half, "train", allow_unlabelled=True)[0]
    assert "label" in open_npz(half, "test", allow_unlabelled=True)[0]
    with pytest.raises(DataError, match=r"images of train without labels: there is no 'train_y'"):
        open_npz(half, "train")


def test_a_sample_of_images_without_labels(save):
    path = save({"train_x": tables(20)["train_x"]})
    config = mlp.Config(image_shape=(3, 4, 1), widths=(5,), num_outputs=7)
    sample = sampling.make_sample(config, path, num_examples=9)
    assert (len(sample), sample.is_labelled) == (9, False)
    assert sample.forward(registry.init(jax.random.key(0), config), sample.batch).shape == (9, 7)
    with pytest.raises(DataError, match=r"images of train without labels"):
        sampling.make_sample(config, path, needs_labels=True)
    with pytest.raises(DataError, match=r"insects.* \(train\): the records have no labels"):
        sampling.make_sample(config, path, num_per_class=2)
    with pytest.raises(DataError, match=r"insects \(train\): the examples have no labels"):
        sampling.make_sample(config, open_npz(path, "train", allow_unlabelled=True), needs_labels=True)
