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


def measured(model):
    """(residual left, share recovered) of `auto` on every pair of the committed ladder."""
    for pair in json.loads(LADDER.read_text())["pairs"]:
        if pair["model"] == model:
            yield pair["residuals"][pair["chosen"]], pair["methods"]["auto"]["recovered"]


def share_inside(model, *, slack=0.0):
    inside = []
    for residual, recovered in measured(model):
        low, high = expect_recovery(residual)
        inside.append(low - slack <= recovered <= high + slack)
    assert len(inside) >= 45
    return np.mean(inside)


def test_it_holds_for_the_pairs_it_was_read_off():
    assert share_inside("narrow") == 1.0


def test_it_holds_for_most_pairs_of_another_width():
    assert share_inside("wide") >= 0.8
    assert share_inside("wide", slack=0.05) >= 0.95
