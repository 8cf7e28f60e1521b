"""The experiments with examples and with many models, made tiny: every row is there, and a second run adds nothing."""

import json

import jax
import ml_collections
import numpy as np
import pytest
from config_files import read_module

from experiments import barrier, few, merge, soups
from experiments.fitting import check_fields
from experiments.samples.results import at_equal_support, recovered
from experiments.samples.ways import WAYS
from experiments.sources import open_task
from experiments.suite.experts import Task
from experiments.suite.score import choose_scale, score_tasks
from jaxtune.models import registry

SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 24, "num_outputs": 16}
VIT = {"model_type": "jaxtune_vit", "channels": 1, **SIZES}
DIGITS = {"name": "digits", "options": {"size": 16, "margin": 1}}
TURN = {"name": "rotate", "options": {"degrees": 90.0}}
SHORT = {"num_steps": 10, "batch_size": 16, "learning_rate": 3e-3}


def tiny_config(name, **changes):
    """A config file's own config, made small."""
    return ml_collections.ConfigDict(read_module(name).get_config().to_dict() | changes)


def rows_of(folder, name):
    return json.loads((folder / name).read_text())["rows"]


@pytest.mark.slow
def test_a_merge_of_every_kind_beside_its_base_and_its_experts(tmp_path, capsys):
    config = tiny_config("merge_glyphs")
    config = tiny_config(
        "merge_glyphs",
        seeds=(0,),
        model=VIT,
        pretrain=dict(sources=(DIGITS,), **SHORT),
        tasks={"low": DIGITS | {"classes": ("0", "1", "2")}, "high": DIGITS | {"classes": ("7", "8", "9")}},
        finetune=SHORT,
        scales=(0.5, 1.0),
        methods={name: config.methods[name].to_dict() for name in ("task_arithmetic", "tsv_m")},
        composed={name: config.composed[name].to_dict() for name in ("RegMean",)},
        num_samples=8,
        num_validation=40,
        num_test=40,
    )
    assert merge.compare(config, tmp_path / "run") is None
    rows = rows_of(tmp_path / "run", "merge.json")
    names = ["base", "experts, one a task", *config.methods, *config.composed]
    assert [(row["scenario"], row["method"]) for row in rows] == [
        (scenario, name) for scenario in ("plain", "stress") for name in names
    ]
    by_name = {(row["scenario"], row["method"]): row for row in rows}
    experts = by_name["plain", "experts, one a task"]
    assert experts["mean_of_ratios"] == 1.0
    assert experts["tasks"] != by_name["stress", "experts, one a task"]["tasks"]
    added = by_name["plain", "task_arithmetic"]
    assert added["scaled"]["scale"] == max((0.5, 1.0), key=lambda scale: added["scaled"]["curve"][str(scale)])
    assert "scaled" not in by_name["plain", "RegMean"]
    assert "### stress" in capsys.readouterr().out

    measured = sorted((tmp_path / "run" / "measured").iterdir())
    before = [file.stat().st_mtime_ns for file in measured]
    merge.compare(config, tmp_path / "run")
    assert [file.stat().st_mtime_ns for file in measured] == before


def test_the_scale_is_chosen_on_validation_records_and_taken_from_the_base():
    config = registry.config_from_dict(VIT)
    base, merged = (registry.init(jax.random.key(seed), config) for seed in (0, 1))
    tasks = {"digits": Task("digits", *(open_task(DIGITS, split) for split in ("train", "validation", "test")))}
    scales = (0.0, 0.5, 1.0)
    scale, scaled, curve = choose_scale(config, base, merged, tasks, scales)
    ends = [score_tasks(config, params, tasks, split="validation")["digits"] for params in (base, merged)]
    np.testing.assert_allclose([curve[0.0], curve[1.0]], ends, atol=1e-9)
    assert scale == min(curve, key=lambda one: (-curve[one], one))
    expected = jax.tree.map(lambda x, y: x + scale * (y - x), base, merged)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), dict(scaled), dict(expected))


@pytest.mark.slow
def test_every_way_to_use_examples_on_every_pair(tmp_path, capsys):
    ways = tiny_config("few").ways.to_dict()
    taken = ("identity", "tied", "distil, support kept", "polish", "proxy logits", "nearest mean")
    config = tiny_config(
        "few",
        num_pairs=2,
        models={"tiny": VIT},
        learning_rates={"tiny": 3e-3},
        pretrain=dict(sources=(DIGITS,), num_steps=10, batch_size=16),
        tasks={"turned": DIGITS | {"shifts": (TURN,)}},
        finetune=SHORT,
        num_test=40,
        num_support=40,
        num_kept=8,
        sizes=(8,),
        ways={name: ways[name] | {"options": short_options(ways[name])} for name in taken},
        comparisons=(("polish", "tied"),),
    )
    assert few.climb(config, tmp_path / "run") is None
    rows = rows_of(tmp_path / "run", "few.json")
    expected = {(way, 8) for way in taken[1:]} | {(way, 0) for way in ("identity", "base", "ceiling")}
    for index in (0, 1):
        assert {(row["way"], row["size"]) for row in rows if row["index"] == index} == expected
    assert len(rows) == 2 * len(expected)
    for row in rows:
        if "curve" in row:
            assert row["curve"]["task"][-1] == row["accuracy"]
            assert len(row["curve"]["support"]) == 4
    page = capsys.readouterr().out
    assert "| polish less tied |" in page
    assert "the same at equal support" in page


@pytest.mark.parametrize("name", ["few", "polish"])
def test_every_way_of_a_config_starts_from_one_of_its_own(name):
    config = read_module(name).get_config()
    check_fields(config, few.FIELDS)
    ways = config.ways.to_dict()
    assert {way["way"] for way in ways.values()} <= WAYS.keys()
    for way in ways.values():
        start = way.get("start", "base")
        assert start == "base" or start in ways
    assert {way for pair in config.comparisons for way in pair} <= ways.keys()


def short_options(way):
    return {"num_steps": 3} if way["way"] in ("distil", "polish") else {}


def curve_row(way, index, task, support):
    curve = {"task": task, "support": support}
    return {"way": way, "index": index, "task": "t", "size": 8, "accuracy": task[-1], "support": support[-1]} | {
        "curve": curve
    }


def test_equal_support_is_read_off_the_way_from_the_new_base():
    ends = [
        {"way": name, "index": 0, "task": "t", "size": 0, "accuracy": accuracy, "support": 0.9}
        for name, accuracy in (("base", 0.1), ("ceiling", 0.9))
    ]
    # Both gain 0.2 a quarter; one loses no support, the other 0.1 a quarter.
    task = [0.3, 0.5, 0.7, 0.9]
    rows = [*ends, curve_row("ours", 0, task, [0.9, 0.9, 0.9, 0.8]), curve_row("theirs", 0, task, [0.8, 0.7, 0.6, 0.5])]
    # At 0.8, the most that both reach: ours is at its end, theirs after the first quarter.
    assert at_equal_support(rows, "ours", "theirs", 8) == pytest.approx((0.6, 0.6, 0.6), abs=1e-9)
    assert at_equal_support(rows, "theirs", "ours", 8)[0] == pytest.approx(-0.6, abs=1e-9)
    assert at_equal_support(rows, "ours", "nobody", 8) is None
    np.testing.assert_allclose(recovered(rows, "ours", 8), [1.0])


@pytest.mark.slow
def test_soups_beside_their_models(tmp_path, capsys):
    config = tiny_config("soups")
    config = tiny_config(
        "soups",
        seeds=(0,),
        model=VIT,
        pretrain=dict(sources=(DIGITS,), **SHORT),
        task=DIGITS,
        num_per_class=4,
        num_models=2,
        draws=config.draws.to_dict() | {"num_steps": (5,)},
        batch_size=16,
        shifts={"turned": TURN},
        soups={name: config.soups[name].to_dict() for name in ("uniform", "greedy")},
        num_validation=40,
        num_test=40,
    )
    assert soups.cook(config, tmp_path / "run") is None
    rows = rows_of(tmp_path / "run", "soups.json")
    singles = [f"model {n}" for n in range(2)]
    assert [row["model"] for row in rows] == ["best single", *singles, *config.soups]
    ours = {row["model"]: row for row in rows}
    best = max(ours[name]["validation"] for name in singles)
    assert ours["best single"]["validation"] == best
    assert ours["greedy"]["validation"] >= best  # it starts from the best and takes in what does not hurt
    assert capsys.readouterr().out.count("\n| ") == 4


@pytest.mark.slow
def test_barriers_of_vision_and_language(tmp_path, capsys):
    text = "To be, or not to be, that is the question. "
    (tmp_path / "plays.jsonl").write_text(
        "".join(
            json.dumps({"task": "plays", "split": split, "text": text * 8, "label": 0, "label_name": "x"}) + "\n"
            for split in ("train", "validation", "test")
        )
    )
    config = tiny_config("barrier")
    plays = config.language.gpt.to_dict()
    plays["model"] |= {"width": 16, "head_width": 8, "num_heads": 2, "num_kv_heads": 2, "mlp_width": 24, "depth": 1}
    plays["model"]["num_positions"] = 16
    plays["data"] = {"name": "plays.jsonl", "options": {"tokens": "bytes", "windows": 16}}
    config = tiny_config(
        "barrier",
        data_dir=str(tmp_path),
        num_pairs=2,
        vision={"tiny": dict(model=VIT, sources=(DIGITS,), **SHORT)},
        language={"tiny gpt": plays | SHORT},
        alignments={"full": config.alignments["full"].to_dict()},
        num_test=40,
    )
    assert barrier.measure(config, tmp_path / "run") is None
    rows = rows_of(tmp_path / "run", "barrier.json")
    assert [(row["model"], row["index"], row["alignment"]) for row in rows] == [
        (model, index, alignment)
        for model in ("tiny", "tiny gpt")
        for index in (0, 1)
        for alignment in ("as they lie", "full")
    ]
    by_key = {(row["model"], row["index"], row["alignment"]): row for row in rows}
    for model in ("tiny", "tiny gpt"):
        there, back = (by_key[model, index, "as they lie"] for index in (0, 1))
        # The second pair is the first one the other way round.
        np.testing.assert_allclose(there["losses"], back["losses"][::-1], rtol=1e-4)
        aligned = by_key[model, 0, "full"]
        assert len(aligned["losses"]) == 25
        np.testing.assert_allclose(aligned["losses"][0], there["losses"][0], rtol=1e-3)  # the same function
    assert "| tiny gpt | full |" in capsys.readouterr().out
