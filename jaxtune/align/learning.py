"""The search behind learned alignment: from a start, by Adam, until held-out inputs say that no step helps.

What is lowered, and how a step is taken, is in `align.learning_steps`; here is what happens between the steps.
"""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.learning_steps import Task, evaluate, take_steps
from jaxtune.align.memory import keep_progress, recall_progress
from jaxtune.align.relaxed import element_of, make_plan, solve_orders, start_latents
from jaxtune.errors import ConfigError, SpecError, unknown_name
from jaxtune.gradients import check_sample
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.symmetry import canonical
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, check_same, flatten, is_float
from jaxtune.types import Params

OBJECTIVES = ("interpolation", "transport")
CHUNK = 10  # steps of one compiled call where nothing happens between them
EVALUATION_BATCH = 128


@dataclass(frozen=True)
class LearnedResult:
    """An element and how it was learned.

    Attributes:
        element: Group -> value.
        is_converged: Whether the held-out loss had stopped falling when the steps ended.
        num_steps: Steps done.
        start_loss, loss: Held-out loss of the start, and of `element`: never above.
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
        mixes: Whether steps see inputs between two examples (`learning_steps.mix_examples`) rather than examples.
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
    if not np.isfinite(scale):
        raise ConfigError(f"scale is {scale}; it must be finite.")
    check_sample(sample, target, is_labelled=False)
    if not spec.is_exact:
        raise SpecError('learned alignment needs exact elements: the symmetry with junctions="shared".')
    networks = {"target": target, "source": source, **({} if finetuned is None else {"finetuned": finetuned})}
    check_same(networks)
    for name, params in networks.items():
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
                state = take_steps(
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
            mean = evaluate(self.task, latents, orders, self.trees, batch, weight)
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


def _narrow(params):
    """A flat tree in float32."""
    return {
        path: np.asarray(leaf).astype(np.float32) if is_float(leaf) else np.asarray(leaf)
        for path, leaf in flatten(params).items()
    }
