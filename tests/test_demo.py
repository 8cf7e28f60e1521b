"""The demo: what ships, what it claims, and that README's lines run."""

import json
import re
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import jaxtune as jt
from jaxtune import tree
from jaxtune.cli import main
from jaxtune.demo.models import RECIPES, copy_models, load_embedded, train_from_scratch
from jaxtune.errors import ConfigError
from jaxtune.models import registry
from jaxtune.transport.registry import without_data

ROOT = Path(__file__).parents[1]


def test_the_embedded_checkpoints_are_small_and_alike():
    folder = Path(str(resources.files("jaxtune"))) / "assets" / "demo"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 3e6
    models = load_embedded()
    assert list(models) == list(RECIPES)
    configs = {json.dumps(registry.config_to_dict(registry.config_from_dict(m.config))) for m in models.values()}
    assert len(configs) == 1
    tree.check_same({name: model.params for name, model in models.items()}, dtypes=True)
    for model in models.values():
        tree.check_finite(str(model.path), model.params)


def test_every_recipe_names_an_experiment_and_a_config_that_exist():
    trained = set()
    for name, (experiment, config, overrides) in RECIPES.items():
        assert (ROOT / "experiments" / f"{experiment}.py").exists()
        assert (ROOT / "configs" / f"{config}.py").exists()
        parents = re.findall(r"\{(\w+)\}", " ".join(overrides))
        assert set(parents) <= trained  # a model is trained after the one that it starts from
        trained.add(name)


def test_training_from_scratch_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.demo.models.__file__", str(tmp_path / "a" / "b" / "models.py"))
    with pytest.raises(ConfigError, match="Clone the repository"):
        train_from_scratch(tmp_path)


@pytest.mark.slow
def test_the_demo_tells_its_story(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert all(method in out for method in without_data())
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    rows = {(row["target"], row["name"]): row for row in report["rows"]}
    assert report["chosen"]["release"] == "identity"
    assert report["evidence"]["release"]["lineage"]["verdict"] == "related"
    assert report["evidence"]["other"]["lineage"]["verdict"] == "unrelated"
    # A newer release takes the fine-tune by addition; a meaningless step of the same size brings nothing.
    assert rows["release", "auto"]["recovered"] > 0.9
    assert rows["release", "random element of the group"]["recovered"] < 0.2
    assert rows["release", "random vector of the same norms"]["recovered"] < 0.2
    # Another seed is where nothing without data carries much; the table must not look better than that.
    assert all(rows["other", method]["recovered"] < 0.3 for method in without_data())
    assert rows["other", "the new base fine-tuned itself"]["recovered"] == 1
    assert all(len(curve) == len(report["scales"]) for sweep in report["sweeps"].values() for curve in sweep.values())
    # All three lines of a target end at the same new base, and begin at the same function.
    for lines in report["lines"].values():
        for end in (0, -1):
            np.testing.assert_allclose([curve[end] for curve in lines.values()], lines["as they are"][end], rtol=1e-3)
    page = (tmp_path / "demo" / "report.html").read_text()
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) >= 9
    for figure in figures:
        ElementTree.fromstring(figure)
    carried = jt.transport(*(jt.load(tmp_path / "demo" / "models" / name) for name in ("old", "old_tuned", "release")))
    assert carried.prepared.info["chosen"] == "identity"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    copy_models(load_embedded(), tmp_path / "runs" / "demo" / "models")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert jt.load("runs/release-tuned").config == jt.load("runs/demo/models/release").config
    assert tree.count_parameters(jt.load("runs/fresh").params) == 142_528
