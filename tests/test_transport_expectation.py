"""What a residual is said to be worth, against what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxtune.transport.expectation import HIGH, LOW, RESIDUALS, expect_recovery

LADDER = Path(__file__).parents[1] / "docs" / "ladder" / "ladder.json"


def test_the_lines_fall_and_do_not_cross():
    assert all(len(line) == len(RESIDUALS) for line in (LOW, HIGH))
    assert np.all(np.diff(RESIDUALS) > 0)
    assert np.all(np.diff(LOW) <= 0)
    assert np.all(np.diff(HIGH) <= 0)
    assert np.all(np.array(LOW) < np.array(HIGH))
    assert expect_recovery(0.0) == (0.97, 1.0)
    assert expect_recovery(9.0) == (LOW[-1], HIGH[-1])
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="residual"):
            expect_recovery(wrong)


def share_inside(measured, *, slack=0.0):
    """Of (residual left, share recovered by `auto`): how many lie between the lines."""
    inside = []
    for residual, recovered in measured:
        low, high = expect_recovery(residual)
        inside.append(low - slack <= recovered <= high + slack)
    return np.mean(inside)


@pytest.mark.parametrize(("model", "share"), [("narrow", 1.0), ("wide", 0.95)])
def test_the_pairs_of_the_ladder_lie_between_the_lines(model, share):
    """A check of the table and no test of the idea: the lines were drawn with these pairs in sight."""
    measured = [
        (pair["residuals"][pair["chosen"]], pair["methods"]["auto"]["recovered"])
        for pair in json.loads(LADDER.read_text())["pairs"]
        if pair["model"] == model
    ]
    assert len(measured) >= 45
    assert share_inside(measured) >= share
    assert share_inside(measured, slack=0.03) == 1.0


def test_so_do_strangers_of_every_width_and_length_of_training():
    cells = json.loads(LADDER.read_text())["transition"]
    assert len({cell["width"] for cell in cells}) >= 4
    assert share_inside([(cell["residual"], cell["recovered"]["auto"]) for cell in cells]) == 1.0
