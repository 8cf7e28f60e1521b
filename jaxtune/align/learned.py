"""Learned alignment: the element under which the networks between two bases predict what the bases do.

Starts from weight matching and moves on by gradient, on inputs without labels. What comes out is a hard element, so the
moved source computes exactly what the source did.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.activations import match_activations
from jaxtune.align.memory import keep_progress, recall_progress
from jaxtune.align.relaxed import Plan, element_of, make_plan, move_leaves, residual_of, solve_orders, start_latents
from jaxtune.align.weights import match_weights
from jaxtune.errors import ConfigError, SpecError, unknown_name
from jaxtune.rng import named_key
from jaxtune.sample import Sample, example_divergences, inputs_of, weighted_mean
from jaxtune.symmetry import canonical
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.form import Form
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, check_same, flatten, is_float, unflatten
from jaxtune.types import Params

# What learning may start from -> weighting of the weight matching.
STARTS = {"weights": "plain", "agreement": "agreement", "activations": None}
OBJECTIVES = ("interpolation", "transport")
WEIGHT_RANGE = (0.4, 0.6)  # where on the line a step looks; half-way alone, or the whole line, learns less
CHUNK = 10  # steps of one compiled call where nothing happens between them
EVALUATION_BATCH = 128
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.999  # of Adam


@dataclass(frozen=True)
class LearnedResult:
    """An element and how it was learned.

    Attributes:
        element: Group -> value.
        is_converged: Whether the held-out loss had stopped falling when the steps ended.
        num_steps: Steps done.
        start_loss, loss: Held-out loss of weight matching, and of `element`: never above.
        losses: (step, held-out loss of the hard element) at every evaluation.
        num_held: Held-out examples.
    """

    element: dict[str, Any]
    is_converged: bool
    num_steps: int
    start_loss: float
    loss: float
    losses: tuple[tuple[int, float], ...]
    num_held: int


@dataclass(frozen=True)
class Training:
    """How the latents learn.

    Attributes:
        num_steps, batch_size: Of Adam.
        learning_rate: Of rotations and maps; falls along a half cosine to a tenth.
        order_rate: The same of the scores behind orders.
        residual_weight: Of the matching residual, which holds the evidence of the weights where inputs are few.
        validation_share: Of the sample, held out to stop by.
        evaluate_every: Steps between looks at it.
        patience: Looks without a new best that end the search.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    order_rate: float
    residual_weight: float
    validation_share: float
    evaluate_every: int
    patience: int
    mixes: bool = True

    def check(self) -> None:
        """Raises `ConfigError` where a number makes no sense."""
        for name in ("num_steps", "batch_size", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("learning_rate", "order_rate", "residual_weight"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be finite and not negative.")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share is {self.validation_share}; it must lie between 0 and 1.")


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
        return value, residual_of(self.plan, moved, target, self.matched)


def match_learned(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    sample: Sample,
    orders: str = "held",
    temperature: float = 1.0,
    num_steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    order_rate: float = 1e-2,
    residual_weight: float = 0.1,
    validation_share: float = 0.2,
    evaluate_every: int = 20,
    patience: int = 10,
    mixes: bool = True,
    start: str = "activations",
) -> LearnedResult:
    """Learns the element under which the line between moved source and target predicts as its ends do.

    Each step draws a batch and a place on the line and lowers `KL(mean prediction of both ends || prediction there)`
    plus `residual_weight` times the matching residual. Rotations, maps inside heads and rotary planes are free, and
    orders where `orders` says so, from where weight matching leaves them; a start at the identity does not get far.

    Args:
        key: Draws batches and places.
        spec: Symmetry of both networks, or of their folded weights.
        target, source: As `match_weights`.
        sample: Inputs; labels are not looked at.
        orders: "held", "straight_through" or "sinkhorn".
        temperature: Of Sinkhorn's iteration.
        num_steps, batch_size, learning_rate, order_rate, residual_weight, validation_share, evaluate_every, patience:
            See `Training`.
        start: What it starts from, a key of `STARTS`.

    Returns:
        The best element seen by the loss of the held-out inputs at the middle of the line, orders hard; weight
        matching's own where nothing was better.

    Raises:
        DataError: the sample is too small to hold some out.
        SpecError: elements of the spec are not exact; the family has no place for folded weights.
        ConfigError: a number makes no sense.
        TreeMismatchError, NonFiniteError, UnknownNameError: as `match_weights`.

    Reference:
        Theus et al. 2025, arXiv:2506.22712 (learned matching, places from U(0.4, 0.6)). Differs: no labels; maps
        inside heads; the residual; inputs mixed with each other; starts from activations; stops by held-out inputs.

    Measured between two networks of other seeds, test loss at the worst of 25 points over the line between the ends,
    in nats, from 512 unlabelled inputs of the training data. Two-block ViTs of width 64 on two kinds of digits: 2.98 as
    they lie, 2.16 by orders, 1.87 by `full`, 1.24 by `activations_full`; learned 0.17 after 300 steps, 0.10 after 1500
    of 128 images with `residual_weight=0.3`. Decoders of that size on Shakespeare's characters: 1.82, 1.32, 0.91, 0.77;
    learned 0.19 after 300 steps, 0.17 after 1200. Neither pair came to zero.
    """
    training = Training(
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        order_rate=order_rate,
        residual_weight=residual_weight,
        validation_share=validation_share,
        evaluate_every=evaluate_every,
        patience=patience,
        mixes=mixes,
    )
    return learn_element(
        key,
        spec,
        target,
        source,
        sample=sample,
        start=start_element(key, spec, target, source, sample=sample, start=start),
        orders=orders,
        temperature=temperature,
        training=training,
    )


def match_straight_through(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    sample: Sample,
    num_steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    order_rate: float = 1e-2,
    residual_weight: float = 0.1,
    validation_share: float = 0.2,
    evaluate_every: int = 20,
    patience: int = 10,
) -> LearnedResult:
    """`match_learned` for orders: every step solves the assignments, and the gradient passes them straight through.

    Reference:
        Ainsworth et al. 2023, arXiv:2209.04836, section 3.3. Differs: what learns are the scores behind the orders, not
        a copy of the weights.
    """
    return match_learned(
        key,
        spec,
        target,
        source,
        sample=sample,
        orders="straight_through",
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        order_rate=order_rate,
        residual_weight=residual_weight,
        validation_share=validation_share,
        evaluate_every=evaluate_every,
        patience=patience,
    )


def match_sinkhorn(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    sample: Sample,
    temperature: float = 1.0,
    num_steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    order_rate: float = 5e-2,
    residual_weight: float = 0.1,
    validation_share: float = 0.2,
    evaluate_every: int = 20,
    patience: int = 10,
) -> LearnedResult:
    """`match_learned` for orders, which are doubly stochastic matrices on the way and hard at the end.

    Reference:
        Peña et al. 2023, arXiv:2212.12042 (Sinkhorn re-basin). Differs: the gradient goes through the iterations, which
        start near convergence, rather than through the implicit function; no labels.
    """
    return match_learned(
        key,
        spec,
        target,
        source,
        sample=sample,
        orders="sinkhorn",
        temperature=temperature,
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        order_rate=order_rate,
        residual_weight=residual_weight,
        validation_share=validation_share,
        evaluate_every=evaluate_every,
        patience=patience,
    )


def start_element(
    key: jax.Array, spec: Spec, target: Params, source: Params, *, sample: Sample, start: str
) -> dict[str, Any]:
    """What learning starts from: weight matching, as transport `full` calls it, or activation matching.

    Raises:
        UnknownNameError: no such start.
    """
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    if start == "activations":
        return match_activations(key, spec, target, source, sample=sample).element
    options = {"head_cost": "circuit", "tolerance": 1e-3} if canonical.is_folded(spec) else {}
    return match_weights(key, spec, target, source, weighting=STARTS[start], **options).element


def learn_element(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    sample: Sample,
    start: elements.Element,
    training: Training,
    orders: str = "held",
    temperature: float = 1.0,
    objective: str = "interpolation",
    finetuned: Params | None = None,
    scale: float = 1.0,
) -> LearnedResult:
    """The search behind `match_learned`, from any start and for either objective.

    Args:
        key, spec, target, source, sample, orders, temperature: As `match_learned`.
        start: Element to begin at.
        training: Steps and rates.
        objective: "interpolation", or "transport": the target with the moved task vector shall predict what the
            fine-tune of the source does.
        finetuned: Fine-tune of the source, for "transport".
        scale: Of the moved task vector, for "transport".

    Raises:
        As `match_learned`.
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    if objective == "transport" and finetuned is None:
        raise ConfigError('objective "transport" needs finetuned=, whose predictions it is about.')
    training.check()
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0.")
    if not spec.is_exact:
        raise SpecError('learned alignment needs exact elements: the symmetry with junctions="shared".')
    check_same({"target": target, "source": source})
    for name, params in (("target", target), ("source", source), *([("finetuned", finetuned)] if finetuned else [])):
        check_finite(name, params)
    plan = make_plan(spec, orders=orders, temperature=temperature)
    learning, held = sample.without_labels().split(training.validation_share)
    trees = {"target": _narrow(target), "source": _narrow(elements.apply(spec, start, source))}
    if objective == "transport":
        trees["finetuned"] = _narrow(finetuned)
        moved = _narrow(elements.apply(spec, start, finetuned))
        trees["vector"] = {
            path: leaf - trees["source"][path] if is_float(leaf) else leaf for path, leaf in moved.items()
        }
    task = Task(
        plan=plan,
        form=spec.form if canonical.is_folded(spec) else None,
        forward=sample.forward,
        objective=objective,
        matched=tuple(path for path in spec.axes if path not in spec.unmatched),
        batch_size=min(training.batch_size, len(learning)),
        mixes=training.mixes,
    )
    return _Search(key, spec, task, training, trees, learning, held, start, scale).run()


class _Search:
    """Host state of one training; `learn_element` is its face."""

    def __init__(self, key, spec, task, training, trees, learning, held, start, scale):
        self.key, self.spec, self.task, self.training = key, spec, task, training
        self.trees, self.start, self.held, self.scale = jax.device_put(trees), start, held, scale
        self.batch = jax.device_put(dict(learning.batch))
        self.rates = {
            group.name: training.learning_rate if mode == "smooth" else training.order_rate
            for group, mode, _ in task.plan.members
        }

    def run(self) -> LearnedResult:
        task, training = self.task, self.training
        latents = start_latents(named_key(self.key, "latents"), task.plan)
        zeros = jax.tree.map(jnp.zeros_like, latents)
        state = {"latents": latents, "mean": zeros, "square": zeros}
        orders = solve_orders(task.plan, latents)
        start_loss = self._judge(latents, orders)
        best = {"latents": latents, "loss": np.float64(start_loss), "step": np.int64(0)}
        losses, step = [(0, start_loss)], 0
        options = {**asdict(training), "objective": task.objective, "modes": task.plan.modes, "scale": self.scale}
        known = recall_progress(self.key, options, {"state": state, "best": best})
        if known is not None:
            trees, facts = known
            state, best, step = trees["state"], trees["best"], facts["step"]
            losses = [tuple(entry) for entry in facts["losses"]]
            start_loss = losses[0][1]
        is_converged = not self.rates
        while step < training.num_steps and not is_converged:
            stop = min(step + training.evaluate_every, training.num_steps)
            while step < stop:
                num = 1 if task.plan.steps_alone else min(CHUNK, stop - step)
                orders = solve_orders(task.plan, state["latents"]) if task.plan.steps_alone else orders
                state = _take_steps(
                    task, num, state, orders, self.trees, self.batch, self.key, self._numbers(), np.int32(step)
                )
                step += num
            orders = solve_orders(task.plan, state["latents"])
            loss = self._judge(state["latents"], orders)
            losses.append((step, loss))
            if loss < float(best["loss"]):
                best = {"latents": state["latents"], "loss": np.float64(loss), "step": np.int64(step)}
            is_converged = step - int(best["step"]) >= training.patience * training.evaluate_every
            keep_progress(self.key, options, {"state": state, "best": best}, {"step": step, "losses": losses})
        return LearnedResult(
            element=self._element(best),
            is_converged=is_converged,
            num_steps=step,
            start_loss=start_loss,
            loss=float(best["loss"]),
            losses=tuple(losses),
            num_held=len(self.held),
        )

    def _numbers(self):
        """What the compiled steps are told, so that another value compiles nothing anew."""
        training = self.training
        numbers = {
            "num_steps": training.num_steps,
            "residual_weight": training.residual_weight,
            "scale": self.scale,
            "rates": self.rates,
        }
        return jax.tree.map(np.float32, numbers)

    def _judge(self, latents, orders):
        """Mean loss of the held-out examples, orders hard: half-way along the line, or at the scale asked for."""
        weight = np.float32(self.scale if self.task.objective == "transport" else 0.5)
        size, total = min(EVALUATION_BATCH, len(self.held)), 0.0
        for batch in self.held.chunks(size):
            mean = _evaluate(self.task, latents, orders, self.trees, batch, weight)
            total += float(mean) * float(batch["weight"].sum())
        loss = total / len(self.held)
        return loss if np.isfinite(loss) else float("inf")

    def _element(self, best):
        """The start, and behind it what was learned; the start alone where nothing better was seen."""
        if not int(best["step"]):
            return dict(self.start)
        plan = self.task.plan
        learned = element_of(plan, self.spec, best["latents"], solve_orders(plan, best["latents"]))
        element = elements.compose(self.spec, learned, self.start)
        elements.check(self.spec, element)
        return element


@partial(jax.jit, static_argnames=("task", "num"))
def _take_steps(task: Task, num: int, state, orders, trees, batch, key, numbers, first):
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
def _evaluate(task: Task, latents, orders, trees, batch, weight):
    return task.divergence(latents, orders, trees, batch, weight, is_hard=True)[0]


def _narrow(params):
    """A flat tree in float32."""
    return {
        path: np.asarray(leaf).astype(np.float32) if is_float(leaf) else np.asarray(leaf)
        for path, leaf in flatten(params).items()
    }
