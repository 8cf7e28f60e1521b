"""Lottery-ticket fine-tuning: two phases by hand, what stays still, deltas that add up, files, and refusals."""

import contextlib

import jax
import linear_task as task
import ml_dtypes
import numpy as np
import pytest
from kills import kill_behind

from jaxtune.checkpoint.safetensors import make_header
from jaxtune.checkpoint.sparse_delta import (
    SparseDelta,
    apply_sparse_deltas,
    make_sparse_delta,
    read_sparse_delta,
    write_sparse_delta,
)
from jaxtune.compose.fitting import Recipe
from jaxtune.compose.sparse_tuning import tune_sparse
from jaxtune.errors import CheckpointError, ConfigError, DataError, TreeMismatchError
from jaxtune.train.checkpoints import StateSeries
from jaxtune.tree import flatten

BASE, SAMPLE = task.draw_params(seed=1, scale=0.3), task.draw_sample(40)
DESCENT = Recipe(30, 0.3, 40, "sgd", clip_norm=None, momentum=0.0, schedule="constant")


def descend(vector, mask, *, steps=30, rate=0.3, l1=0.0):
    """Gradient descent on the entries of a mask, one step after the other, in float64."""
    start = vector.copy()
    for _ in range(steps):
        slope = task.loss_of(vector, SAMPLE)[1] + l1 * np.sign(vector - start) / vector.size
        vector = vector - rate * mask * slope
    return vector


@pytest.mark.parametrize(("density", "num_rounds"), [(0.34, 1), (0.4, 2)])
def test_it_equals_two_phases_of_plain_descent(density, num_rounds):
    found = tune_sparse(BASE, SAMPLE, density=density, num_rounds=num_rounds, full=DESCENT, sparse=DESCENT)
    base = current = task.to_vector(BASE)
    mask = np.zeros(base.size, bool)
    for number in range(num_rounds):
        change = np.abs(descend(current, 1.0) - base)
        change[mask] = -1
        count = int(density * 15) * (number + 1) // num_rounds - int(density * 15) * number // num_rounds
        mask[np.argsort(-change, kind="stable")[:count]] = True
        current = descend(current, mask)
    np.testing.assert_allclose(task.to_vector(found.params), current, atol=1e-5)
    np.testing.assert_array_equal(task.to_vector(found.params) != base, mask)
    assert found.delta.num_entries == mask.sum() == found.info["num_chosen"]
    assert (len(found.info["rounds"]), len(found.info["rounds"][0]["sparse"])) == (num_rounds, 30)


def test_neither_momentum_nor_decay_moves_what_is_masked():
    recipe = Recipe(10, 0.1, 16, "adamw", weight_decay=0.5)
    found = tune_sparse(BASE, SAMPLE, density=0.2, full=recipe, sparse=recipe)
    changed = {path: leaf != flatten(BASE)[path] for path, leaf in flatten(found.params).items()}
    assert sum(int(leaf.sum()) for leaf in changed.values()) == 3
    # b + (a - b) is a but for one rounding.
    again = apply_sparse_deltas(BASE, [found.delta])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, found.params)
    # A decay that is large decides where the chosen entries of the matrix go: it reaches them.
    strong = Recipe(10, 0.1, 16, "adamw", weight_decay=9.0)
    other = tune_sparse(BASE, SAMPLE, density=0.2, full=recipe, sparse=strong)
    kernel = changed["head/kernel"]
    assert np.abs(other.params["head"]["kernel"][kernel]).sum() < np.abs(found.params["head"]["kernel"][kernel]).sum()


def test_an_l1_pull_keeps_the_full_phase_near_the_base():
    losses = [
        tune_sparse(BASE, SAMPLE, density=0.3, l1=l1, full=DESCENT, sparse=DESCENT).info["rounds"][0]["smallest_chosen"]
        for l1 in (0.0, 1.0)
    ]
    change = np.abs(descend(task.to_vector(BASE), 1.0, l1=1.0) - task.to_vector(BASE))
    assert losses[1] < losses[0]
    np.testing.assert_allclose(losses[1], np.sort(change)[-4], rtol=0.05)  # signs flip about 0


def test_leaves_stay_fixed_or_are_kept_whole():
    found = tune_sparse(BASE, SAMPLE, density=0.5, full=DESCENT, sparse=DESCENT, whole="head/bias")
    assert set(found.delta.shapes) == {"head/kernel"}
    assert found.delta.num_entries == 6
    np.testing.assert_array_equal(found.delta.whole["head/bias"], found.params["head"]["bias"])
    assert (found.params["head"]["bias"] != BASE["head"]["bias"]).all()
    skipped = apply_sparse_deltas(BASE, [found.delta], skip=("head/bias",))
    np.testing.assert_array_equal(skipped["head"]["bias"], BASE["head"]["bias"])
    fixed = tune_sparse(BASE, SAMPLE, density=0.5, full=DESCENT, sparse=DESCENT, fixed="head/bias")
    np.testing.assert_array_equal(fixed.params["head"]["bias"], BASE["head"]["bias"])


def test_deltas_add_up_in_any_order():
    tunes = [tune_sparse(BASE, task.draw_sample(40, seed=n), density=0.4, full=DESCENT, sparse=DESCENT) for n in (0, 1)]
    deltas = [tune.delta for tune in tunes]
    both = apply_sparse_deltas(BASE, deltas)
    expected = jax.tree.map(lambda base, a, b: a + b - base, BASE, *(tune.params for tune in tunes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), both, apply_sparse_deltas(BASE, deltas[::-1])
    )
    half = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), BASE)
    assert {leaf.dtype.name for leaf in flatten(apply_sparse_deltas(half, deltas)).values()} == {"bfloat16"}


def test_files_hold_places_and_values(tmp_path):
    delta = make_sparse_delta(BASE, task.draw_params(seed=9), whole=("head/bias",))
    write_sparse_delta(tmp_path / "delta.safetensors", delta)
    again = read_sparse_delta(tmp_path / "delta.safetensors")
    assert again.shapes == delta.shapes == {"head/kernel": (4, 3)}
    for name in ("indices", "values", "whole"):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b, strict=True), getattr(again, name), getattr(delta, name)
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        apply_sparse_deltas(BASE, [again]),
        task.draw_params(seed=9),
    )
    tiny = jax.tree.map(lambda leaf: leaf + np.float32(5e-8), BASE)
    assert make_sparse_delta(BASE, tiny).num_entries == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.array([1, 0])}, "do not increase within 0 to 11"),
        ({"indices": np.array([0, 12])}, "do not increase within 0 to 11"),
        ({"indices": np.array([-1, 0])}, "do not increase within 0 to 11"),
        ({"indices": np.array([0, 1], np.int32)}, "needs int64 indices and float32 values"),
        ({"values": np.array([1, np.nan], np.float32)}, "hold NaN or Inf"),
        ({"values": np.array([1], np.float32)}, r"indices int64\[2\], values float32\[1\]"),
        ({"more": np.zeros(1)}, "belongs to no leaf"),
        ({"format": "other"}, "not a sparse delta: its metadata has format 'other'"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    tensors = {"indices": np.array([0, 5]), "values": np.ones(2, np.float32), **change}
    metadata = {"format": tensors.pop("format", "jaxtune-sparse-delta"), "shapes": '{"a/kernel": [4, 3]}'}
    tensors = {name if name == "more" else f"a/kernel/{name}": leaf for name, leaf in tensors.items()}
    make_header(tensors, metadata).write(tmp_path / "x.safetensors", tensors.__getitem__)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*" + message):
        read_sparse_delta(tmp_path / "x.safetensors")


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.compose.fitting.SAVE_EVERY", 4)
    options = {"density": 0.4, "num_rounds": 2, "full": Recipe(6, 0.1, 16), "sparse": Recipe(7, 0.1, 16)}
    whole = tune_sparse(BASE, SAMPLE, **options)

    def run():
        with contextlib.ExitStack() as stack:
            series = [stack.enter_context(StateSeries(tmp_path / str(n))) for n in range(4)]
            return tune_sparse(BASE, SAMPLE, series=series, **options), [one.latest_step for one in series]

    kill_behind(1, run)  # within the first full phase
    kill_behind(2, run)  # within the first sparse one
    kill_behind(4, run)  # within the sparse phase of the second round
    found, steps = run()
    assert steps == [6, 7, 6, 7]
    jax.tree.map(np.testing.assert_array_equal, whole.params, found.params)
    assert found.info == whole.info


def test_refusals():
    with pytest.raises(ConfigError, match=r"density 0 must lie in \(0, 1\]"):
        tune_sparse(BASE, SAMPLE, density=0)
    with pytest.raises(ConfigError, match=r"density 0\.01 of 15 entries is 0, fewer than one"):
        tune_sparse(BASE, SAMPLE, density=0.01)
    with pytest.raises(ConfigError, match=r"whole='\[' is no regular expression"):
        tune_sparse(BASE, SAMPLE, whole="[")
    with pytest.raises(DataError, match="planes: sparse fine-tuning needs labelled"):
        tune_sparse(BASE, SAMPLE.without_labels())
    dead = task.draw_sample(40)
    dead.batch["image"][:, 1:] = 0  # inputs that are never on: their weights have no gradient
    with pytest.raises(ConfigError, match="6 entries moved in the full fine-tune and 9 are to be chosen"):
        tune_sparse(BASE, dead, density=0.6, full=DESCENT, sparse=DESCENT)
    delta = SparseDelta({"head/weight": (2,)}, {"head/weight": np.array([0])}, {"head/weight": np.ones(1, np.float32)})
    with pytest.raises(TreeMismatchError, match=r"head/weight has shape \[2\], the base has no such leaf"):
        apply_sparse_deltas(BASE, [delta])
    whole = make_sparse_delta(BASE, BASE, whole=("head/bias",))
    with pytest.raises(TreeMismatchError, match="head/bias is whole in two sparse deltas"):
        apply_sparse_deltas(BASE, [whole, whole])
