"""What learned alignment lowers, and its steps of Adam on latents, compiled once for a kind of network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.relaxed import Plan, move_leaves, residual_of
from jaxtune.rng import named_key
from jaxtune.sample import example_divergences, inputs_of, weighted_mean
from jaxtune.symmetry import canonical
from jaxtune.symmetry.form import Form
from jaxtune.tree import is_float, unflatten

WEIGHT_RANGE = (0.4, 0.6)  # where on the line a step looks; half-way alone, or the whole line, learns less
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.999  # of Adam


@dataclass(frozen=True)
class Task:
    """What is fixed while the latents learn; hashable, a static argument of the compiled steps."""

    plan: Plan
    form: Form | None
    forward: Callable[..., jax.Array]
    objective: str
    matched: tuple[str, ...]
    batch_size: int
    mixes: bool

    def logits(self, leaves: Mapping[str, Any], batch: Mapping[str, Any]) -> jax.Array:
        """Of the network that a flat tree is, folded or not."""
        tree = unflatten(leaves)
        return self.forward(tree if self.form is None else canonical.lay_out(self.form, tree), inputs_of(batch))

    def teach(self, trees: Mapping[str, Any], batch: Mapping[str, Any]) -> jax.Array:
        """Log-probabilities of the teacher: the mean of both bases, or the fine-tune of the source."""
        if self.objective == "transport":
            return jax.nn.log_softmax(self.logits(trees["finetuned"], batch), axis=-1)
        both = [jax.nn.log_softmax(self.logits(trees[name], batch), axis=-1) for name in ("source", "target")]
        return jnp.logaddexp(*both) - np.float32(np.log(2))

    def divergence(self, latents, orders, trees, batch, weight, *, is_hard: bool) -> tuple[jax.Array, jax.Array]:
        """(divergence of the teacher from what the latents make, matching residual).

        `weight` is the source's share on the line, or the scale of the moved task vector.
        """
        moved = move_leaves(self.plan, latents, orders, trees["source"], is_hard=is_hard)
        target = trees["target"]
        if self.objective == "transport":
            vector = move_leaves(self.plan, latents, orders, trees["vector"], is_hard=is_hard)
            model = {path: leaf + weight * vector[path] if is_float(leaf) else leaf for path, leaf in target.items()}
        else:
            model = {
                path: weight * moved[path] + (1 - weight) * leaf if is_float(leaf) else leaf
                for path, leaf in target.items()
            }
        teacher = jax.lax.stop_gradient(self.teach(trees, batch))
        value = weighted_mean(example_divergences(self.logits(model, batch), teacher, batch), batch)
        return value, residual_of(moved, target, self.matched)


@partial(jax.jit, static_argnames=("task", "num"))
def take_steps(task: Task, num: int, state, orders, trees, batch, key, numbers, first):
    """`num` steps of Adam."""
    size = len(next(iter(batch.values())))

    def step(state, index):
        pick_key, weight_key = (named_key(jax.random.fold_in(key, index), name) for name in ("batch", "weight"))
        rows = jax.random.choice(pick_key, size, (task.batch_size,), replace=False)
        taken = {name: values[rows] for name, values in batch.items()}
        if task.mixes:
            taken = mix_examples(named_key(jax.random.fold_in(key, index), "mix"), taken)
        low, high = WEIGHT_RANGE
        weight = jax.random.uniform(weight_key, (), jnp.float32, low, high)
        weight = numbers["scale"] if task.objective == "transport" else weight

        def loss_of(latents):
            value, residual = task.divergence(latents, orders, trees, taken, weight, is_hard=False)
            return value + numbers["residual_weight"] * residual

        gradient = jax.grad(loss_of)(state["latents"])
        done = index.astype(jnp.float32)
        mean = _decay(state["mean"], gradient, MEAN_DECAY)
        square = _decay(state["square"], jax.tree.map(jnp.square, gradient), SQUARE_DECAY)
        unbias = jnp.sqrt(1 - SQUARE_DECAY ** (done + 1)) / (1 - MEAN_DECAY ** (done + 1))
        fall = 0.1 + 0.45 * (1 + jnp.cos(np.float32(np.pi) * done / numbers["num_steps"]))
        latents = {
            name: _descend(values, mean[name], square[name], fall * unbias * numbers["rates"][name])
            for name, values in state["latents"].items()
        }
        return {"latents": latents, "mean": mean, "square": square}, None

    return jax.lax.scan(step, state, first + jnp.arange(num, dtype=jnp.int32))[0]


def mix_examples(key: jax.Array, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A batch between its examples: images in shares drawn by chance, texts up to a place drawn by chance.

    Nobody knows a label of such an input, and nobody is asked for one: both networks say what they predict.

    Shapes:
        batch[...]: N first; result: the same.
    """
    size = len(next(iter(batch.values())))
    share = jax.random.uniform(key, (size,), jnp.float32)
    mixed = {}
    for name, values in batch.items():
        other = jnp.roll(values, 1, axis=0)
        if jnp.issubdtype(values.dtype, jnp.floating):
            part = share.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)
            mixed[name] = part * values + (1 - part) * other
        else:
            place = jnp.arange(values.shape[1], dtype=jnp.float32) / values.shape[1] if values.ndim > 1 else share * 0
            is_own = place[None] < share[:, None] if values.ndim > 1 else share > 0.5
            mixed[name] = jnp.where(is_own.reshape(*is_own.shape, *[1] * (values.ndim - 2)), values, other)
    return mixed


def _decay(old, new, decay):
    return jax.tree.map(lambda a, b: np.float32(decay) * a + np.float32(1 - decay) * b, old, new)


def _descend(values, mean, square, rate):
    return jax.tree.map(lambda x, m, s: x - rate * m / (jnp.sqrt(s) + 1e-8), values, mean, square)


@partial(jax.jit, static_argnames="task")
def evaluate(task: Task, latents, orders, trees, batch, weight):
    return task.divergence(latents, orders, trees, batch, weight, is_hard=True)[0]
