"""What errors say of examples that do not fit: file, key, what came, what was expected, and what to do."""

import json
import re

import jax
import numpy as np
import pytest

import jaxtune as jt
from jaxtune.data import ArraySource, open_source
from jaxtune.errors import ConfigError, DataError
from jaxtune.merging import merge_recipe
from jaxtune.models import decoder, mlp, registry, resnet
from jaxtune.opening import open_examples
from jaxtune.recipes.nodes import RecipeError
from jaxtune.sampling import make_sample, make_text_sample

GREY = mlp.Config(image_shape=(4, 4, 1), widths=(5,), num_outputs=2)
TEXT = decoder.Config(
    vocab_size=259, width=16, depth=1, num_heads=2, num_kv_heads=1, head_width=8, mlp_width=16, num_positions=16
)
IMAGES = np.random.RandomState(0).randint(0, 256, (12, 4, 4)).astype(np.uint8)
LABELS = np.arange(12) % 2


@pytest.fixture
def save(tmp_path):
    def write(name="x.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write


@pytest.fixture
def texts(tmp_path):
    lines = [{"split": "train", "text": f"word {n}", "label": n % 2} for n in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "t.jsonl"


def test_texts_for_a_network_of_images(texts):
    with pytest.raises(DataError, match=r"t\.jsonl: these are texts, .* takes images of 4 x 4 x 1 .* \.npz file"):
        open_examples(GREY, texts)
    with pytest.raises(DataError, match=r"^t \(train\): these are texts, .* takes images of any x any x 3"):
        make_sample(resnet.Config(num_outputs=2), open_source(texts, "train"))


def test_images_for_a_network_of_texts(save):
    path = save(train_x=IMAGES, train_y=LABELS)
    with pytest.raises(DataError, match=r"x\.npz: these are images, .* takes texts\. Give texts: a \.jsonl file"):
        open_examples(TEXT, path)
    with pytest.raises(DataError, match=r"^x \(train\): these are images, and the network takes texts"):
        make_text_sample(TEXT, open_source(path, "train"))


def test_only_the_advice_that_applies(save):
    colour, small = np.stack([IMAGES] * 3, -1), IMAGES[:, :2, :3]
    with pytest.raises(DataError) as raised:
        open_examples(GREY, save("c.npz", train_x=colour, train_y=LABELS), num_examples=9)
    assert re.search(r"c\.npz: c\+sample\(9\) \(train\): the images are float32\[9, 4, 4, 3\]", str(raised.value))
    assert str(raised.value).endswith(
        "takes float[N, 4, 4, 1]. They have 3 channels, the network takes 1: take their mean."
    )
    with pytest.raises(DataError, match=r"float\[N, 4, 4, 1\]\. They are 2 x 3: resize them to 4 x 4\.$"):
        open_examples(GREY, save(train_x=small, train_y=LABELS))
    with pytest.raises(
        DataError, match=r"\[N, any, any, 3\]\. They have 1 channel, .* 3: repeat it on the last axis\.$"
    ):
        open_examples(resnet.Config(num_outputs=2), save(train_x=IMAGES, train_y=LABELS))


def test_bad_pixels_and_labels_are_found_by_index(save):
    bad = np.where(np.isin(np.arange(12), [3, 7])[:, None, None], np.nan, IMAGES / 255)
    with pytest.raises(
        DataError, match=r"32 of 192 pixels are NaN or Inf, in images 3, 7 \(2 of 12\)\. Leave those out"
    ):
        open_source(save(train_x=bad, train_y=LABELS), "train")
    path = save(train_x=IMAGES, train_y=np.arange(12), class_names=np.array(["a", "b"]))
    with pytest.raises(DataError, match=r"records 2, 3, 4, 5, 6, \.\.\. \(10 of 12\)\. Leave those out, or number"):
        open_source(path, "train")

    class Broken(ArraySource):
        def __getitems__(self, indices):
            batch = super().__getitems__(indices)
            return {**batch, "image": np.where(np.asarray(indices)[:, None, None, None] == 5, np.inf, batch["image"])}

    with pytest.raises(DataError, match=r"'image' holds NaN or Inf in examples 5 \(1 of 12\)\. Leave those out"):
        make_sample(GREY, Broken("mine", "train", IMAGES, LABELS, ("a", "b")))


@pytest.mark.parametrize(
    ("image", "label"), [("test_x", "test_y"), ("labels_test", None), ("images_test", "labels_test")]
)
def test_the_missing_key_of_labels(save, image, label):
    path = save(**{image: IMAGES}) if label else save(x_test=IMAGES)
    image, label = (image, label) if label else ("x_test", "y_test")
    with pytest.raises(DataError, match=f"there is no '{label}' beside '{image}'.*what needs none takes") as raised:
        open_source(path, "test")
    assert "allow_unlabelled" not in str(raised.value)


def test_the_split_that_is_not_there(save, texts):
    path = save(test_x=IMAGES, test_y=LABELS)
    with pytest.raises(DataError, match=r"no train split in it, only test\..*\(split=test\), or save train_x"):
        open_source(path, "train")
    with pytest.raises(DataError, match=r"no validation split in it, and no train split to cut one from, only test"):
        open_source(path, "validation")
    with pytest.raises(DataError, match=r"has no test texts, only train\..*\(split=train\)"):
        open_source(texts, "test")
    texts.write_text(texts.read_text().replace('"train"', '"test"'))
    with pytest.raises(DataError, match=r"has no train texts, only test"):
        open_source(texts, "train")


def test_files_that_are_no_archives(tmp_path):
    np.save(tmp_path / "arr.npy", IMAGES)
    with pytest.raises(DataError, match=r"arr\.npy: an \.npy file holds one array.*np\.savez\(\"x\.npz\", train_x="):
        open_source(tmp_path / "arr.npy", "train")
    for content, found in ((b"some words", r"begins with b'some w'"), (b"", "it is empty")):
        (tmp_path / "t.npz").write_bytes(content)
        with pytest.raises(DataError, match=rf"t\.npz: no \.npz archive, .*{found}\.") as raised:
            open_source(tmp_path / "t.npz", "train")
        assert "pickle" not in str(raised.value)


@pytest.fixture
def recipe(tmp_path, save):
    """YAML of a recipe whose second model has no labels."""
    params = jax.tree.map(np.asarray, registry.init(jax.random.key(0), GREY))
    for name in ("base", "a", "b"):
        jt.save(tmp_path / name, params, config=registry.config_to_dict(GREY))
    save("a.npz", train_x=IMAGES, train_y=LABELS)
    save("b.npz", train_x=IMAGES)

    def write(method, *lines):
        models = ", ".join(f"{{model: {tmp_path / name}}}" for name in "ab")
        sources = ", ".join(f"{tmp_path / name}: {name}.npz" for name in "ab")
        head = [f"merge_method: {method}", f"base_model: {tmp_path / 'base'}", f"models: [{models}]"]
        (tmp_path / "r.yml").write_text("\n".join([*head, "data:", f"  sources: {{{sources}}}", *lines]) + "\n")
        return tmp_path / "r.yml"

    return write


def test_recipes_name_the_line_of_a_source_without_labels(recipe, tmp_path):
    with pytest.raises(
        RecipeError, match=r"r\.yml, line 5, .*sources\..*/b: .*b\.npz: .* no 'train_y' beside 'train_x'"
    ):
        merge_recipe(recipe("atlas"), tmp_path / "out")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ("  samples: 4", "  validation: 0.9"),
            r"r\.yml, line 7, .*data\.validation: a\+.*: data\.validation is 0\.9, which of 4 .* \(data\.samples\)",
        ),
        (
            ("parameters: {validation: 0.95}",),
            r"r\.yml, line 6, .*a \(train\): parameters\.validation is 0\.95, which of 10 examples leaves none",
        ),
        (("parameters: {validation: 1.5}",), r"r\.yml, line 6, .*parameters\.validation: the share .* is 1\.5"),
    ],
)
def test_recipes_name_the_line_of_a_share_that_leaves_none(recipe, tmp_path, lines, said):
    with pytest.raises(RecipeError, match=said):
        merge_recipe(recipe("ada_merging", *lines), tmp_path / "out")


def test_a_sample_without_labels_was_passed(save):
    params = jax.tree.map(np.asarray, registry.init(jax.random.key(0), GREY))
    sample = make_sample(GREY, save(train_x=IMAGES))
    with pytest.raises(ConfigError, match=r"needs labelled examples, and x \(train\) has no labels.*gradfix_teacher"):
        jt.transport(params, params, params, method="gradfix", sample=sample, config=GREY)
