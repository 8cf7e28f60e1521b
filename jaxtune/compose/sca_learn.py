"""ScaLearn in weight space: every output of every matrix weighs the task vectors for itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compose import objectives
from jaxtune.compose.composition import Composition, check_counts, check_models, check_samples
from jaxtune.compose.running import learn_composition, split_samples
from jaxtune.compose.scoring import mean_score, score_all
from jaxtune.compose.vectors import stack_vectors
from jaxtune.errors import ConfigError
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Params


@own_states()
def sca_learn(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    is_uniform: bool = False,
    is_shared: bool = False,
    output_axes: Mapping[str, int] | None = None,
    num_epochs: int = 10,
    learning_rate: float = 6e-3,
    batch_size: int = 32,
    dropout: float = 0.3,
    mean: float | None = None,
    deviation: float = 1e-3,
    validation: float = 0.25,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """A task from other tasks' fine-tunes: `θ_0 + Σ_s diag(ω_s) τ_s`, ω a number for each output of each leaf.

    What an adapter slot adds to each of its outputs is a weighted sum over sources; for weights that is a weighted sum
    of rows (of columns, as our kernels lie), and nothing is left to do at inference.

    Args:
        base: As `registry.compose`.
        finetuned: The sources, S of them.
        samples: One of the target task; or several, whose losses are added. With labels.
        is_uniform: Whether all outputs of a leaf share one number a source.
        is_shared: The form "++": leaves of equal names in all blocks (`block_0/mlp/up/kernel`, `block_1/mlp/up/kernel`)
            share their numbers; with `is_uniform`, all leaves do, so that there are S numbers.
        output_axes: Path -> how many of its last axes are outputs; None: 2 where the leaf is a kernel of heads
            (`.../q/kernel`, k, v), else 1. Of vectors every entry is an output.
        num_epochs, learning_rate, batch_size: Of AdamW without decay; at least 10 steps an epoch.
        dropout: Share of the numbers that are 0 in a step, the others scaled up for it.
        mean, deviation: Of the normal distribution that they come from; mean None: 2 / S.
        validation: Share of each sample that is kept for choosing among epochs; 0 keeps the last.
        seed: Of the first numbers, of dropout, of the split and of the order.
        series: As `learning.learn`.

    Returns:
        `coefficients`: {name: float32[S, outputs]} ([S, 1] where uniform); `info` as `running.learn_composition`.

    Raises:
        ConfigError, DataError, TreeMismatchError, NonFiniteError: models, samples or numbers make no sense.

    Reference:
        Frohmann et al. 2024, arXiv:2310.01217. Differs: on differences of weights instead of outputs of adapters, which
        is the same for linear ones; the target's head is part of the model or of its frozen read-out.
    """
    check_models(base, finetuned)
    check_samples(samples, samples, is_labelled=True)
    if not samples:
        raise ConfigError("there is no sample of the target task.")
    check_counts(num_epochs=num_epochs, batch_size=batch_size)
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout is {dropout}; it must be at least 0 and below 1.")
    learned_on, held = split_samples(samples, validation, seed)
    fixed, count = stack_vectors(base, finetuned), len(finetuned)
    build = BuildRows(_layout(fixed["vectors"], output_axes, is_uniform, is_shared))
    key = named_key(jax.random.key(seed), "sca_learn")
    middle = 2 / count if mean is None else mean
    first = {
        name: np.asarray(middle + deviation * jax.random.normal(named_key(key, name), (count, size)), np.float32)
        for name, size in build.sizes().items()
    }
    per_epoch = max(10, max(-(-len(sample) // batch_size) for sample in learned_on))
    return learn_composition(
        base, build, fixed, first, learned_on, held, objective=objectives.cross_entropy,
        num_steps=num_epochs * per_epoch, learning_rate=learning_rate, batch_size=batch_size,
        transform=Dropout(dropout) if dropout else None, seed=seed, series=series, score_every=per_epoch,
        score=(lambda params, _: mean_score(score_all(params, held))) if validation else None,
    )  # fmt: skip


class BuildRows:
    """`θ_0 + Σ_s ω_s ⊙ τ_s`, ω along the outputs; numbers: {name: float32[S, outputs]}.

    Args:
        layout: Path -> (name of its numbers, how many there are a source, how many last axes are outputs).
    """

    def __init__(self, layout: Mapping[str, tuple[str, int, int]]):
        self._layout = tuple(sorted(layout.items()))

    def sizes(self) -> dict[str, int]:
        """Name -> numbers a source."""
        return {name: size for _, (name, size, _) in self._layout}

    def __call__(self, fixed: Any, numbers: Mapping[str, jax.Array]) -> Params:
        flat = flatten(fixed["base"])
        moved = {}
        for path, (name, size, axes) in self._layout:
            vectors = fixed["vectors"][path]
            outputs = vectors.shape[vectors.ndim - axes :] if size > 1 else (1,) * axes
            weights = numbers[name].reshape(len(vectors), *(1,) * (vectors.ndim - 1 - axes), *outputs)
            moved[path] = flat[path] + jnp.sum(weights * vectors, axis=0)
        return unflatten({**flat, **moved})

    def __hash__(self):
        return hash(self._layout)

    def __eq__(self, other):
        return isinstance(other, BuildRows) and self._layout == other._layout


class Dropout:
    """Numbers of a step: each 0 with a probability, else larger by as much."""

    def __init__(self, rate: float):
        self._rate = rate

    def __call__(self, numbers: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        kept = {
            name: jax.random.bernoulli(named_key(key, name), 1 - self._rate, values.shape)
            for name, values in numbers.items()
        }
        return {name: jnp.where(kept[name], values / (1 - self._rate), 0.0) for name, values in numbers.items()}

    def __hash__(self):
        return hash(self._rate)

    def __eq__(self, other):
        return isinstance(other, Dropout) and self._rate == other._rate


def _layout(vectors, output_axes, is_uniform, is_shared):
    layout = {}
    for path, stacked in vectors.items():
        shape = stacked.shape[1:]
        words = path.split("/")
        is_of_heads = len(words) > 1 and words[-2] in ("q", "k", "v") and words[-1] == "kernel"
        axes = output_axes.get(path, 1) if output_axes is not None else (2 if is_of_heads else 1)
        axes = len(shape) if len(shape) < 2 or words[-1] == "bias" else min(axes, len(shape))
        size = 1 if is_uniform else int(np.prod(shape[len(shape) - axes :], dtype=np.int64))
        name = path
        if is_shared:
            name = "all" if is_uniform else "/".join(word for word in words if not _counts(word))
        layout[path] = (name, size, axes)
    sizes: dict[str, int] = {}
    for path, (name, size, axes) in layout.items():
        if sizes.setdefault(name, size) != size:  # of another width: numbers of its own
            layout[path] = (path, size, axes)
    return layout


def _counts(word):
    return word.rpartition("_")[2].isdecimal()
