"""The training loop: steps, numbers, checkpoints, and going on after a kill as if nothing had happened."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jaxtune.errors import ConfigError, DataError, NonFiniteError
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.metrics import MetricsWriter
from jaxtune.train.progress import Progress
from jaxtune.train.signals import StopSignals
from jaxtune.train.step import Batch, TrainState, TrainStep
from jaxtune.types import Params

STEP_METRICS = ("loss", "accuracy", "grad_norm")  # of `make_train_step`, averaged over the steps since the last row


class Batches(Protocol):
    """A stream of batches that knows where it stands; `jaxtune.data.Loader` is one."""

    batch_size: int

    def __iter__(self) -> Generator[Batch, None, None]: ...

    def state(self) -> dict[str, int]:
        """Position of the next batch not yet handed out."""

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on from a position."""


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        state: After the last step done.
        is_finished: False where a signal ended it early.
        stop_signal: Number of that signal, or None.
        examples_per_second: Of this process, without compilation, evaluation and checkpoints; NaN below two steps.
    """

    state: TrainState
    is_finished: bool
    stop_signal: int | None
    examples_per_second: float


def train(
    step: TrainStep,
    state: TrainState,
    batches: Batches,
    *,
    num_steps: int,
    frozen: Params | None = None,
    series: StateSeries | None = None,
    save_every: int = 1000,
    writer: MetricsWriter | None = None,
    log_every: int = 50,
    learning_rate: Callable[[int], Any] | None = None,
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    evaluate_every: int = 1000,
) -> TrainResult:
    """Runs until `num_steps` updates are done in all, from the newest checkpoint where there is one.

    A run that is killed and started again gives the same bits as one that was not, on the same machine: state,
    position in the data, random bits (a function of the step) and half-filled averages all come back.
    SIGINT or SIGTERM ends the run after the step under way, with a checkpoint.

    Args:
        step: Of `make_train_step`.
        state: Before the first step; donated.
        batches: Where batches come from; its position is set on resume.
        num_steps: Length of the whole run.
        frozen: Handed to every step.
        series: Where states are saved and found; without one nothing is saved.
        save_every: Steps between two checkpoints; one more comes at the end.
        writer: Takes a row every `log_every` steps and after every evaluation.
        log_every: Steps over which the training numbers are averaged.
        learning_rate: Schedule, only shown: number of updates done -> rate of the next.
        evaluate: `state.params` -> numbers, under the names that the writer's columns have.
        evaluate_every: Steps between two evaluations; one more comes at the end.

    Raises:
        ConfigError: an interval is below 1.
        NonFiniteError: the loss is NaN or infinite; the checkpoints before stay.
        DataError: `batches` ended before `num_steps`.
        CheckpointError: `series` belongs to another model or optimiser.
    """
    for name, interval in (("save_every", save_every), ("log_every", log_every), ("evaluate_every", evaluate_every)):
        if interval < 1:
            raise ConfigError(f"{name} is {interval}; it must be at least 1.")
    window = _Window()
    if series is not None and series.latest_step is not None:
        state, saved = series.restore(state)
        batches.restore(saved["batches"])
        window = _Window(**saved["window"])
    num_before = int(state.step)
    if writer is not None:
        writer.open(num_before)
    stopwatch = _Stopwatch()
    with (
        StopSignals() as signals,
        contextlib.closing(iter(batches)) as stream,
        Progress(num_steps, "train", start=num_before) as progress,
    ):
        for num_done in range(num_before + 1, num_steps + 1):
            state, metrics = step(state, frozen or {}, _next_batch(stream, num_done, num_steps))
            window.add(num_done, metrics)
            stopwatch.lap(batches.batch_size)
            is_last = num_done == num_steps
            is_stopped = signals.received is not None

            row = {}
            if num_done % log_every == 0 or is_last:
                row |= window.close()
                if learning_rate is not None:
                    row["learning_rate"] = float(learning_rate(num_done - 1))
            if evaluate is not None and (num_done % evaluate_every == 0 or is_last):
                row |= evaluate(state.params)
            if row and writer is not None:
                writer.write(num_done, row)
            # After the row: a restored step always finds its row in the file.
            is_saved = series is not None and (num_done % save_every == 0 or is_last or is_stopped)
            if is_saved:
                series.save(state, {"batches": batches.state(), "window": window.state()})
            if row or is_saved:
                stopwatch.skip()
            progress.update(num_done, row)
            if is_stopped and not is_last:
                return TrainResult(state, False, signals.received, stopwatch.rate)
    return TrainResult(state, True, None, stopwatch.rate)


def _next_batch(stream, num_done, num_steps):
    try:
        return next(stream)
    except StopIteration:
        raise DataError(
            f"the data ended after {num_done - 1} of {num_steps} steps. Loop over it without end "
            "(num_epochs=None), or ask for fewer steps."
        ) from None


class _Window:
    """Sums of the step metrics since the last row; float64 in step order, so a resumed sum has the same bits."""

    NUM_IN_FLIGHT = 2  # steps that the device may run ahead of the host, each holding a batch

    def __init__(self, count: int = 0, sums: Mapping[str, float] | None = None):
        self._count = count
        self._sums = dict(sums) if sums is not None else dict.fromkeys(STEP_METRICS, 0.0)
        self._pending = []

    def add(self, num_done: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of one step; waits for the step `NUM_IN_FLIGHT` before it."""
        self._pending.append((num_done, metrics))
        self._fold(self.NUM_IN_FLIGHT)

    def close(self) -> dict[str, float]:
        """The means; the next window begins empty."""
        self._fold(0)
        means = {name: total / self._count for name, total in self._sums.items()}
        self._count, self._sums = 0, dict.fromkeys(STEP_METRICS, 0.0)
        return means

    def state(self) -> dict[str, Any]:
        """Arguments that make this window again."""
        self._fold(0)
        return {"count": self._count, "sums": dict(self._sums)}

    def _fold(self, num_left):
        while len(self._pending) > num_left:
            num_done, metrics = self._pending.pop(0)
            values = {name: float(metrics[name]) for name in STEP_METRICS}
            if not all(math.isfinite(value) for value in values.values()):
                raise NonFiniteError(
                    f"step {num_done}: {', '.join(f'{name} {value}' for name, value in values.items())}. Training "
                    "diverged: lower the learning rate or clip the gradient. Checkpoints of earlier steps stay."
                )
            self._count += 1
            self._sums = {name: self._sums[name] + value for name, value in values.items()}


class _Stopwatch:
    """Examples per second of the steps alone."""

    def __init__(self):
        self._num_examples, self._seconds, self._mark = 0, 0.0, None

    def lap(self, num_examples: int) -> None:
        """Counts one step; the first compiles and is left out."""
        now = time.perf_counter()
        if self._mark is not None:
            self._num_examples += num_examples
            self._seconds += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Leaves out the time since the last lap."""
        self._mark = time.perf_counter()

    @property
    def rate(self) -> float:
        return self._num_examples / self._seconds if self._seconds else math.nan
