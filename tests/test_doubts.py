"""Numbers that would mislead: networks read by other names of classes, and differences that no example shows."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxtune as jt
from jaxtune.cli import main
from jaxtune.data.source import open_source
from jaxtune.deciding.verdict import compare
from jaxtune.errors import ConfigError
from jaxtune.evaluate.doubts import doubt, doubt_names
from jaxtune.loading import network_of
from jaxtune.models.readout import class_embeddings
from jaxtune.sample import Sample
from jaxtune.sampling import make_sample

DEMO = Path(jt.__file__).parent / "assets" / "demo"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The handwritten digits as a file, under the names that the demo's networks know."""
    arrays = {"class_names": np.array([str(digit) for digit in range(10)])}
    for split in ("train", "test"):
        source = open_source("digits", split)
        batch = source.__getitems__(range(200))
        arrays |= {f"{split}_x": batch["image"], f"{split}_y": batch["label"]}
    path = tmp_path_factory.mktemp("digits") / "digits_again.npz"
    np.savez(path, **arrays)
    return str(path)


OTHER = "class_prefix=mine/"


def test_a_network_is_read_by_names_where_it_has_other_outputs():
    source = open_source("digits", "test")
    found = jt.evaluate(DEMO / "old_tuned", "digits")
    assert found.accuracy > 0.9
    own = class_embeddings(source.class_names, 64)
    assert jt.evaluate(DEMO / "old_tuned", source, embeddings=own).accuracy == found.accuracy
    many = jt.evaluate([DEMO / "old_tuned", DEMO / "old"], "digits")
    assert many[0].accuracy == pytest.approx(found.accuracy)
    assert many[1].accuracy == pytest.approx(jt.evaluate(DEMO / "old", "digits").accuracy)


def transport(out, *words):
    roles = ("--source", DEMO / "old", "--finetuned", DEMO / "old_tuned", "--target", DEMO / "release")
    return main(["transport", *map(str, roles), "--method", "identity", "--no-verify", "--out", str(out), *words])


def test_other_names_of_the_classes_are_noticed(digits, tmp_path, capsys):
    assert transport(tmp_path / "out", "--evaluate", digits, "--evaluate-option", OTHER) == 0
    said = capsys.readouterr().out
    assert "--evaluate: the fine-tune has" in said
    assert "Its 64 outputs are read by the names of the 10 classes" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["doubts"]) == 1
    assert transport(tmp_path / "right", "--evaluate", digits) == 0
    assert "the fine-tune has" not in capsys.readouterr().out
    right = json.loads((tmp_path / "right" / "report.json").read_text())
    assert right["doubts"] == []
    assert right["measured"][1]["task"] > 0.9


@pytest.mark.parametrize("name", ["keep", "evaluate", "support"])
def test_an_option_of_data_that_is_not_there_is_refused(name, tmp_path, capsys):
    given = ("--data", "digits", "--polish", "distill") if name == "keep" else ()
    assert transport(tmp_path / "out", f"--{name}-option", "a=b", *given) == 2
    assert f"--{name}-option goes with --{name} DATA" in capsys.readouterr().err


def test_a_sample_of_other_names_is_doubted(digits):
    tuned = jt.load(DEMO / "old_tuned")
    wrong = make_sample(network_of(tuned), digits, num_examples=64, class_prefix="mine/")
    right = make_sample(network_of(tuned), digits, num_examples=64)
    assert "64 labelled examples of its own task right, where 10 % is chance" in doubt_names(wrong, tuned.params)
    assert doubt_names(right, tuned.params) is None
    assert doubt_names(wrong.without_labels(), tuned.params) is None


def test_a_recipe_says_which_model_guesses(digits, tmp_path):
    names = {role: str(DEMO / role) for role in ("old", "old_tuned")}
    wrong = {"name": digits, "split": "train", "class_prefix": "mine/"}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": names["old"],
        "models": [{"model": names["old_tuned"]}],
        "data": {"samples": 32, "sources": {names["old_tuned"]: wrong}, "search": {"lambda": [0.5, 1.0]}},
    }
    notes = jt.merge_recipe(recipe, tmp_path / "out")["notes"]
    (doubtful,) = [note for note in notes if "is chance" in note]
    assert doubtful.startswith(f"data: {names['old_tuned']} has ")
    assert "{name: FILE, class_prefix: WORD/}" in doubtful


def test_what_is_clearly_above_chance_is_not_doubted():
    assert doubt(0.2, 100, num_classes=10, num_outputs=64) is None
    assert doubt(0.15, 100, num_classes=10, num_outputs=64)


def test_examples_that_nothing_reads_are_refused_in_python():
    sample = make_sample(network_of(jt.load(DEMO / "old")), "digits", num_examples=8)
    models = [DEMO / name for name in ("old", "old_tuned", "release")]
    for method in ("auto", "identity"):
        with pytest.raises(ConfigError, match=rf"method '{method}' does not look at examples. Pass polish='distill'"):
            jt.transport(*models, method=method, sample=sample)
    with pytest.raises(ConfigError, match="keep= goes with a polish"):
        jt.transport(*models, keep=sample)


def fixed(right, *, seed=0):
    """(sample, a network that has these examples right): its parameters are the logits."""
    label = np.random.RandomState(seed).randint(3, size=len(right))
    said = np.where(right, label, (label + 1) % 3)
    batch = {"row": np.arange(len(right)), "label": label}
    return Sample("s", batch, forward), {"logits": np.eye(3, dtype=np.float32)[said]}


def forward(params, batch):
    return params["logits"][batch["row"]]


def test_a_difference_counts_where_the_two_differ():
    before, after = np.array([1, 1, 0, 0] * 10, bool), np.array([1, 1, 1, 0] * 10, bool)
    sample, one = fixed(before)
    _, other = fixed(after)
    gain, error, is_same = compare(one, other, [sample], [1.0])
    assert gain == pytest.approx(0.25)
    assert not is_same
    # Ten of forty changed, all one way, and half a count on either side: 11 of 42 that differ, 10 more than the others.
    assert error == pytest.approx(((11 / 42 - (10 / 42) ** 2) / 42) ** 0.5)
    assert gain > 1.645 * error
    backward = compare(other, one, [sample], [1.0])
    assert backward[:2] == pytest.approx((-gain, error))
    assert compare(one, one, [sample], [1.0])[2]


def test_one_example_of_eight_tells_nothing():
    sample, one = fixed(np.zeros(8, bool))
    _, other = fixed(np.array([1] + [0] * 7, bool))
    gain, error, _ = compare(one, other, [sample, sample], [0.5, 0.5])
    assert gain == pytest.approx(0.125)
    assert gain < 1.645 * error


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_where_nothing_differs_a_verdict_is_rare(rate):
    """Two networks equally often right: one side of 95 %, so about one in ten is told apart, one way or the other."""
    draw, told = np.random.RandomState(0), 0
    for _ in range(200):
        sample, one = fixed(draw.uniform(size=24) < rate)
        _, other = fixed(draw.uniform(size=24) < rate)
        gain, error, _ = compare(one, other, [sample], [1.0])
        told += abs(gain) > 1.645 * error
    assert told / 200 < 0.14
