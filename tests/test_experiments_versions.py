"""The chain of releases as an experiment: every row is there, and the ways agree where they are the same."""

import json

import ml_collections
import pytest
from config_files import read_module

from experiments.versions import WAYS, compare


def tiny_config():
    config = read_module("versions").get_config().to_dict()
    config["model"] |= {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 16, "image_size": 16, "patch_size": 8}
    config["model"] |= {"num_outputs": 16}
    digits = {"name": "digits", "options": {"size": 16, "margin": 1}}
    schedule = {"num_steps": 3, "learning_rate": 1e-3, "batch_size": 16}
    config["releases"] = [{"data": digits, "schedule": schedule}] * 3
    config["task"] = digits | {"classes": ("0", "1", "2")}
    config |= {"num_seeds": 1, "finetune": schedule, "short_steps": (0,)}
    return ml_collections.ConfigDict(config)


def test_every_release_way_and_length_has_its_row(tmp_path, capsys):
    assert compare(tiny_config(), tmp_path / "run") is None
    rows = json.loads((tmp_path / "run" / "versions.json").read_text())["rows"]
    assert {(row["release"], row["way"], row["steps"]) for row in rows} == {
        (release, way, steps) for release in (1, 2) for way in WAYS for steps in (0, 3)
    }
    assert len(rows) == 12

    def loss(release, way, steps):
        key = (release, way, steps)
        return next(row["loss"] for row in rows if (row["release"], row["way"], row["steps"]) == key)

    # On the second release both ways carry the very same difference; on the third without training too.
    for release, steps in ((1, 0), (1, 3), (2, 0)):
        # Equal but for the rounding of one difference more.
        assert loss(release, "recycled", steps) == pytest.approx(loss(release, "first difference", steps), rel=1e-5)
    assert loss(2, "recycled", 3) != loss(2, "first difference", 3)
    assert "| 3 | recycled |" in capsys.readouterr().out
    page = (tmp_path / "run" / "versions.md").read_text()
    assert page.count("\n| ") == 6
    assert "Barrier between a release" in page
