"""A soup whose weights are learned, one a model or one a model and leaf."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compose.composition import Composition, check_counts, check_models, check_samples
from jaxtune.compose.learning import learn, realise
from jaxtune.compose.objectives import cross_entropy
from jaxtune.compose.scoring import score as score_one
from jaxtune.compose.soup_pot import mend_statistics, observe_of
from jaxtune.compose.vectors import narrow
from jaxtune.errors import ConfigError, DataError, unknown_name
from jaxtune.sample import Batch, Sample
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Params

PER = ("model", "leaf")


@own_states()
def learned_soup(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    per: str = "leaf",
    learning_rate: float = 0.05,
    epochs: int = 5,
    batch_size: int = 32,
    validation: float = 0.0,
    include_base: bool = False,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """Minimises the cross-entropy of `β · logits(Σ_m softmax(a)_m θ_m)` on held-out examples, over a and β.

    Args:
        base: What all were fine-tuned from; its dtypes are the result's.
        finetuned: The ingredients, all in memory at once.
        samples: One, labelled, held out from their training.
        per: "model": one number for each; "leaf": one for each and every float leaf.
        learning_rate: Of AdamW, without weight decay.
        epochs: Passes over the examples.
        batch_size: Examples a step.
        validation: Share of the sample that is not learned on; after every epoch the loss there is looked at, and the
            best epoch is kept, the start among them. 0: the last epoch is kept.
        include_base: Whether the base is an ingredient too, the last one.
        seed: Of the order of examples and of the split.
        series: Where states are kept, for a run that goes on after a kill.

    Returns:
        `coefficients`: {"weights": float32[M], or path -> float32[M]; "output_scale": β}. β is of the logits and is no
        part of the parameters: it changes no prediction. `info`: "loss" of every step, "validation" before and after,
        on the share that was held, or on what was learned on where none was.

    Raises:
        ConfigError: no model, or a number out of range.
        UnknownNameError: another value of `per`.
        DataError: more or fewer samples than one, or no labels.
        TreeMismatchError: the models differ in a path or a shape.
        NonFiniteError: the loss is NaN.

    Reference:
        Wortsman et al. 2022, arXiv:2203.05482, appendix I. Differs: batches of 32, not of 256, so that a few hundred
        examples still make a few dozen steps. Running statistics of batch norms are averaged while learning, and taken
        from the examples afterwards.
    """
    if per not in PER:
        raise unknown_name("value of per", per, PER)
    check_counts(epochs=epochs, batch_size=batch_size)
    if not 0 <= validation < 1:
        raise ConfigError(f"validation is {validation}; it must be at least 0 and below 1.")
    check_models(base, finetuned)
    if len(samples) != 1:
        raise DataError(f"a soup is of models of one task and takes one sample, got {len(samples)}.")
    models = [*finetuned, base] if include_base else list(finetuned)
    check_samples(models[:1], samples, is_labelled=True)
    train, held = samples[0].split(validation, seed=seed) if validation else (samples[0], samples[0])
    start = np.full(len(models), 1 / len(models), np.float32)
    paths = [path for path, leaf in flatten(models[0]).items() if is_float(leaf)]
    numbers = {"logits": start if per == "model" else dict.fromkeys(paths, start), "output_scale": np.float32(1)}
    fixed = _stack(models)
    scaled, held_scaled = (replace(one, forward=ScaledOutputs(one.forward)) for one in (train, held))
    num_steps = -(-len(train) // min(batch_size, len(train)))
    found = learn(
        build_soup,
        fixed,
        numbers,
        [scaled],
        objective=cross_entropy,
        num_steps=epochs * num_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        score=_HeldLoss(held_scaled) if validation else None,
        score_every=num_steps,
        seed=seed,
        series=series,
    )
    made = [realise(build_soup, fixed, these) for these in (numbers, found.numbers)]
    info = {
        **found.history,
        "step": found.step,
        "validation": {
            name: score_one(params, held_scaled) for name, params in zip(("start", "learned"), made, strict=True)
        },
    }
    weights = jax.tree.map(lambda a: np.asarray(jax.nn.softmax(a)), found.numbers["logits"])
    coefficients = {"weights": weights, "output_scale": float(found.numbers["output_scale"])}
    params = mend_statistics(observe_of(base, train), made[1]["model"], train)
    return Composition(narrow(jax.tree.map(np.asarray, params), base), info, coefficients)


def build_soup(fixed: Any, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """{"model": the mixture, in float32; "output_scale": β}."""
    logits = numbers["logits"]
    leaves = {
        path: jnp.tensordot(jax.nn.softmax(logits[path] if isinstance(logits, Mapping) else logits), stack, axes=1)
        for path, stack in fixed["models"].items()
    }
    return {"model": unflatten({**fixed["others"], **leaves}), "output_scale": numbers["output_scale"]}


@dataclass(frozen=True)
class ScaledOutputs:
    """The logits of a network times a number that is learned beside it.

    Attributes:
        forward: That of a `Sample`.
    """

    forward: Callable[[Params, Batch], jax.Array]

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        logits = self.forward(params["model"], batch)
        return logits * params["output_scale"].astype(logits.dtype)


class _HeldLoss:
    """Minus the loss on examples that were not learned on: the higher the better."""

    def __init__(self, sample):
        self._sample = sample

    def __call__(self, params, own):
        del own
        return -score_one(params, self._sample)["loss"]


def _stack(models):
    flats = [flatten(model) for model in models]
    mixed = [path for path, leaf in flats[0].items() if is_float(leaf)]
    stacked = {path: np.stack([np.asarray(flat[path], np.float32) for flat in flats]) for path in mixed}
    return {"models": stacked, "others": {path: leaf for path, leaf in flats[0].items() if path not in stacked}}
