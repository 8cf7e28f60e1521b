"""The loop: it learns, it resumes bit for bit, it stops when told, and it says what went wrong."""

import os
import signal

import jax
import numpy as np
import pytest

from jaxtune import tree
from jaxtune.errors import CheckpointError, DataError, NonFiniteError
from jaxtune.models import mlp, registry, resnet
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.loop import train
from jaxtune.train.metrics import MetricsWriter
from jaxtune.train.optimizer import make_optimizer, make_schedule
from jaxtune.train.step import create_state, make_mesh, make_train_step

MLP = mlp.Config(image_shape=(4, 4, 1), widths=(16,), num_outputs=3)
RESNET = resnet.Config(num_outputs=3, depth=8, channels=1)
NUM_STEPS = 24

init = jax.jit(registry.init, static_argnums=1)  # a ResNet op by op takes seconds


class PlantedBatches:
    """Images labelled by the largest of three hidden directions; batch i is a function of i."""

    batch_size = 16

    def __init__(self, *, length=None, scale=1.0, before=lambda index: None):
        self.index, self.length, self.scale, self.before = 0, length, scale, before
        self.directions = np.random.default_rng(7).normal(size=(16, 3))

    def __iter__(self):
        while self.length is None or self.index < self.length:
            self.before(self.index)
            images = np.random.default_rng(self.index).normal(size=(self.batch_size, 4, 4, 1))
            labels = (images.reshape(self.batch_size, 16) @ self.directions).argmax(axis=1)
            self.index += 1
            yield {"image": (self.scale * images).astype(np.float32), "label": labels.astype(np.int32)}

    def state(self):
        return {"index": self.index}

    def restore(self, state):
        self.index = state["index"]


def run(folder, batches, *, config=MLP, num_steps=NUM_STEPS, learning_rate=0.01, save_every=5, **options):
    mesh = make_mesh(batches.batch_size)
    schedule = make_schedule(learning_rate, num_steps, num_warmup_steps=2)
    optimizer = make_optimizer(schedule)

    def is_trainable(path):
        return registry.is_trainable(config, path)

    def forward(params, frozen, batch, key):
        return registry.apply_train(config, params, batch, key)

    step = make_train_step(forward, optimizer, mesh, jax.random.key(1), is_trainable=is_trainable)
    state = create_state(init(jax.random.key(0), config), optimizer, mesh, is_trainable=is_trainable)
    columns = ["loss", "accuracy", "grad_norm", "learning_rate", "size"]
    with StateSeries(folder / "checkpoints", num_kept=2) as series, MetricsWriter(folder, columns) as writer:
        return train(
            step,
            state,
            batches,
            num_steps=num_steps,
            series=series,
            save_every=save_every,
            writer=writer,
            log_every=4,
            learning_rate=schedule,
            evaluate=lambda params: {"size": float(np.sum(np.square(params["head"]["kernel"])))},
            evaluate_every=10,
            **options,
        )


def assert_same_bits(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, two)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (folder, result)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, PlantedBatches())


def rows_of(folder):
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_planted_task_is_learnt(tmp_path):
    result = run(tmp_path, PlantedBatches(), num_steps=200, learning_rate=0.02, save_every=100)
    losses, accuracies = ([float(row[name]) for row in rows_of(tmp_path) if row[name]] for name in ("loss", "accuracy"))
    assert abs(losses[0] - np.log(3)) < 0.5
    assert np.mean(losses[-5:]) < 0.3  # 20 steps of 16 examples
    assert np.mean(accuracies[-5:]) > 0.9
    assert result.is_finished
    assert result.examples_per_second > 0


def test_rows_stand_at_their_steps_and_average_over_theirs(whole):
    folder, _ = whole
    rows = rows_of(folder)
    assert [int(row["step"]) for row in rows] == [4, 8, 10, 12, 16, 20, 24]
    assert [row["step"] for row in rows if row["size"]] == ["10", "20", "24"]
    assert [row["step"] for row in rows if not row["loss"]] == ["10"]
    # Warm-up of 2 steps to 0.01, then half a cosine over 22; step 12 was taken at the rate of update 11.
    np.testing.assert_allclose(float(rows[3]["learning_rate"]), 0.005 * (1 + np.cos(np.pi * 9 / 22)), rtol=1e-5)


def test_two_runs_give_the_same_bits(whole, tmp_path):
    folder, result = whole
    again = run(tmp_path, PlantedBatches())
    assert_same_bits(again.state, result.state)
    assert (tmp_path / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()


class Killed(Exception):
    pass


@pytest.mark.parametrize("index", [5, 7, 10, 18])
def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path, index):
    def kill(at):
        if at == index:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, PlantedBatches(before=kill))
    result = run(tmp_path, PlantedBatches())
    assert_same_bits(result.state, whole[1].state)
    assert (tmp_path / "metrics.csv").read_bytes() == (whole[0] / "metrics.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_and_nothing_is_lost(whole, tmp_path, number):
    before = signal.getsignal(number)

    def interrupt(at):
        if at == 6:
            os.kill(os.getpid(), number)

    stopped = run(tmp_path, PlantedBatches(before=interrupt))
    assert (stopped.is_finished, stopped.stop_signal, int(stopped.state.step)) == (False, number, 7)
    assert "7" in os.listdir(tmp_path / "checkpoints")
    assert signal.getsignal(number) is before
    # The second half begins inside an averaging window, whose sums come from the checkpoint.
    result = run(tmp_path, PlantedBatches())
    assert_same_bits(result.state, whole[1].state)
    assert (tmp_path / "metrics.csv").read_bytes() == (whole[0] / "metrics.csv").read_bytes()


def test_a_second_ctrl_c_is_not_waited_out(tmp_path):
    def interrupt(at):
        if at == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, PlantedBatches(before=interrupt))


def test_a_finished_run_does_nothing_more(whole, tmp_path):
    run(tmp_path, PlantedBatches(), num_steps=5)

    def fail(at):
        raise AssertionError("a batch was asked for")

    result = run(tmp_path, PlantedBatches(before=fail), num_steps=5)
    assert result.is_finished
    assert int(result.state.step) == 5


def test_the_newest_checkpoints_stay(whole):
    assert sorted(os.listdir(whole[0] / "checkpoints")) == ["20", "24"]


def test_divergence_is_an_error_and_the_good_checkpoints_stay(tmp_path):
    class Poisoned(PlantedBatches):
        def __iter__(self):
            for index, batch in enumerate(super().__iter__()):
                yield {**batch, "image": batch["image"] * (np.nan if index == 8 else 1)}

    with pytest.raises(NonFiniteError, match="step 9: loss nan"):
        run(tmp_path, Poisoned())
    assert os.listdir(tmp_path / "checkpoints") == ["5"]


def test_data_that_ends_is_an_error(tmp_path):
    with pytest.raises(DataError, match="ended after 9 of 24 steps"):
        run(tmp_path, PlantedBatches(length=9))


def test_another_models_checkpoint_is_refused(tmp_path):
    run(tmp_path, PlantedBatches(), num_steps=5)
    wider = mlp.Config(image_shape=(4, 4, 1), widths=(17,), num_outputs=3)
    with pytest.raises(CheckpointError, match=r"params/head/kernel: wanted float32\[17, 3\], saved float32\[16, 3\]"):
        run(tmp_path, PlantedBatches(), config=wider)


def test_batch_norm_statistics_move_outside_the_optimiser(tmp_path):
    start = tree.flatten(jax.tree.map(np.asarray, init(jax.random.key(0), RESNET)))
    state = run(tmp_path, PlantedBatches(scale=3.0), config=RESNET, num_steps=4).state
    statistics = [path for path in start if not registry.is_trainable(RESNET, path)]
    assert len(statistics) == 18  # mean and var of the stem, of two norms in each of 3 blocks, of 2 shortcuts
    for path in statistics:
        assert not np.array_equal(tree.flatten(state.params)[path], start[path]), path
    moments = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in
               jax.tree_util.tree_flatten_with_path(state.opt_state)[0]]  # fmt: skip
    assert any(path.endswith("stem_norm/scale") for path in moments)
    assert not [path for path in moments if path.endswith(("/mean", "/var"))]
