"""The networks of the ladder: trained once, kept on disk under their names, found there by the next run.

A hundred short trainings of one architecture, so the steps run in compiled chunks (one program for all trainings
that share a schedule); `experiments.pretrain` is for runs that are long enough to need checkpoints and metrics.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.checkpoint import load, write_checkpoint
from jaxtune.checkpoint.output import make_layout
from jaxtune.checkpoint.publish import publish
from jaxtune.data import DataSource, Loader
from jaxtune.errors import NonFiniteError
from jaxtune.models import registry
from jaxtune.models.readout import class_embeddings, read_out
from jaxtune.train.optimizer import make_optimizer, make_schedule
from jaxtune.train.step import cross_entropy
from jaxtune.types import Params

CHUNK = 25  # steps of one compiled call


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW, a warm-up over a tenth of the steps, a cosine to a twentieth of the peak."""

    num_steps: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.05


class Networks:
    """Every network of one architecture, by name.

    Args:
        config: Of the model family.
        folder: Where they are kept.
    """

    def __init__(self, config: Any, folder: Path):
        self.config, self._folder = config, folder

    def get(self, name: str, make: Callable[[], Params]) -> Params:
        """The network called `name`, made now if it is not on disk."""
        path = self._folder / name
        if not path.exists():
            params = jax.tree.map(np.asarray, make())
            with publish(path) as staging:
                write_checkpoint(staging, params, make_layout(params, registry.config_to_dict(self.config)))
        return load(path).params

    def train(
        self,
        name: str,
        start: Callable[[], Params],
        source: DataSource,
        schedule: Schedule,
        *,
        seed: int,
        branch: tuple[int, int] | None = None,
        label_smoothing: float = 0.0,
    ) -> Params:
        """The network that `start()` becomes after training on `source`.

        Args:
            name: Under which it is kept.
            start: Parameters before the first step; not called where the network is on disk.
            source: Its class names give the frozen read-out.
            schedule: Length and rate.
            seed: Of the order of the data.
            branch: (step, seed): from that step on the order is that of another seed.
            label_smoothing: Share of the target spread evenly over the classes.

        Raises:
            NonFiniteError: training diverged.
        """

        def make():
            print(f"training {name}", file=sys.stderr, flush=True)
            batches = _batches(source, schedule, seed, branch)
            chunk, init = _compile(self.config, schedule, label_smoothing)
            params = jax.tree.map(jnp.array, start())  # copies: the chunk donates them
            state, embeddings = init(params), jnp.asarray(class_embeddings(source.class_names, self._width))
            for begin in range(0, schedule.num_steps, CHUNK):
                taken = list(itertools.islice(batches, min(CHUNK, schedule.num_steps - begin)))
                stacked = {key: np.stack([batch[key] for batch in taken]) for key in taken[0]}
                params, state, loss = chunk(params, state, embeddings, stacked)
            if not np.isfinite(loss):
                raise NonFiniteError(f"{name}: training diverged. Lower the learning rate.")
            return params

        return self.get(name, make)

    @property
    def _width(self) -> int:
        return self.config.num_outputs


def _batches(source, schedule, seed, branch) -> Iterator[dict[str, np.ndarray]]:
    step, other = branch if branch is not None else (schedule.num_steps, seed)
    for num, order in ((step, seed), (schedule.num_steps - step, other)):
        if num:
            loader = Loader(source, min(schedule.batch_size, len(source)), seed=order)
            yield from itertools.islice(loader, num)


@functools.cache
def _compile(config, schedule, label_smoothing):
    """(one chunk of steps, the optimiser's first state) of a schedule; jit compiles once per number of classes."""
    rate = make_schedule(
        schedule.learning_rate,
        schedule.num_steps,
        num_warmup_steps=max(1, schedule.num_steps // 10) if schedule.num_steps > 1 else 0,
        final_fraction=0.05,
    )
    optimizer = make_optimizer(rate, weight_decay=schedule.weight_decay)

    def step(carry, batch, embeddings):
        params, state = carry

        def loss_of(params):
            logits = read_out(registry.apply(config, params, batch), embeddings)
            return cross_entropy(logits, batch["label"], label_smoothing)

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def chunk(params, state, embeddings, batches):
        (params, state), losses = jax.lax.scan(lambda c, b: step(c, b, embeddings), (params, state), batches)
        return params, state, losses[-1]

    return chunk, jax.jit(optimizer.init)
