"""Grafting: the few coordinates of a fine-tune that carry its skill, found by gradients and put onto the base."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compose.composition import Composition, check_counts, check_models, check_samples
from jaxtune.compose.fitting import Recipe, fit, join, narrow, split
from jaxtune.compose.masks import count_true, largest, matching, overlaps
from jaxtune.compose.measuring import measure
from jaxtune.errors import ConfigError
from jaxtune.rng import named_key
from jaxtune.sample import Sample, example_losses, weighted_mean
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.tree import flatten
from jaxtune.types import Params

SHIFT = 10.0  # a mask moves away from where it started only where its logit has grown by about so much


@own_states("weight")
def graft(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    share: float = 0.01,
    num_passes: int = 10,
    learning_rate: float = 1.0,
    batch_size: int = 32,
    keeps_share: bool = True,
    penalty: float = 0.0,
    validation: float = 0.25,
    weight: float = 1.0,
    exclude: str | None = None,
    whole: str | None = None,
    seed: int = 0,
    states: Sequence[StateSeries] | None = None,
) -> Composition:
    """`θ_0 + w Σ_t γ_t ⊙ τ_t`, each mask γ_t learned alone on examples of its task; nothing else is trained.

    `mask(S) = γ + (1 - 2γ) σ(S - 10)` starts at γ, the `⌊share n⌋` entries of τ that are largest in magnitude in the
    whole network, and S learns which of them to give up and which others to take.

    Args:
        base, finetuned: Models; one sample each.
        samples: Labelled.
        share: Of the entries that masks start with.
        num_passes: Over the examples.
        learning_rate: Of S, in units of the size that its first gradient has.
        batch_size: Examples of one step.
        keeps_share: Whether a rounded mask has as many entries as it started with, those that the soft one says most
            of; False takes all above one half, a mask that grows as long as the loss falls.
        penalty: Factor of the share that is kept, in the loss: above 0, masks become smaller.
        validation: Share of each sample that chooses: after each pass the mask is rounded and looked at on it, and the
            best one is kept, the start among them. 0 learns and chooses on all.
        weight: w.
        exclude: Leaves (a regular expression of whole paths) that keep the base.
        whole: Leaves that take the fine-tune whole, for instance a new head.
        seed: Of the split, of S and of the order.
        states: Where states of the search are kept, a series for each model.

    Returns:
        The model. `coefficients`: one {path: bool} a task. `info["tasks"]`: for each the share kept at the start and at
        the end, "pass" of the mask, "scores" of all passes, and on validation the accuracy, loss and calibration error
        of "base", "finetuned", "magnitude" (the start) and "graft", with "retained", the graft's accuracy over the
        fine-tune's; `info["overlap"]`: |∩| / min of each two masks.

    Raises:
        ConfigError: a number out of range.
        DataError: no labels, or a sample too small to be split.

    Reference:
        Panigrahi et al. 2023, arXiv:2302.06600. Differs: plain SGD steps through σ' ≈ 1e-4 there, with a rate of 1e7;
        here the step of S is the gradient of the mask itself, divided by the root mean square of the first one, so that
        one rate serves all networks and no step explodes where σ' grows. Such steps can take in many entries, hence
        `keeps_share`. Exactly `⌊share n⌋` entries, of equal ones the first; the release keeps one fewer.
    """
    check_models(base, finetuned)
    check_samples(finetuned, samples, is_labelled=True)
    check_counts(num_passes=num_passes, batch_size=batch_size)
    if not 0 <= share <= 1 or penalty < 0:
        raise ConfigError(f"share {share} must lie in [0, 1], penalty {penalty} must not be negative.")
    if states is not None and len(states) != len(finetuned):
        raise ConfigError(f"{len(finetuned)} models, and series of states for {len(states)}: one for each is needed.")
    masks, tasks = [], []
    for n, (model, sample) in enumerate(zip(finetuned, samples, strict=True)):
        series = None if states is None else states[n]
        mask, info = _learn(
            base, model, sample, share, num_passes, learning_rate, batch_size, keeps_share, penalty, validation,
            exclude, whole, seed, series,
        )  # fmt: skip
        masks.append(mask)
        tasks.append(info)
    params = apply_masks(base, finetuned, masks, weight=weight)
    return Composition(params, {"tasks": tasks, "overlap": overlaps(masks)}, masks)


def apply_masks(
    base: Params, finetuned: Sequence[Params], masks: Sequence[Mapping[str, np.ndarray]], *, weight: float = 1.0
) -> dict[str, Any]:
    """`base + weight Σ_t mask_t ⊙ (finetuned_t - base)`; a leaf without a mask is the base's.

    With one task and weight 1 a kept entry has the bits of the fine-tune.
    """
    flat, models = flatten(base), [flatten(model) for model in finetuned]
    grafted = dict(flat)
    for path in dict.fromkeys(path for mask in masks for path in mask):
        old = np.asarray(flat[path], np.float32)
        if len(masks) == 1 and weight == 1:
            grafted[path] = np.where(masks[0][path], np.asarray(models[0][path], np.float32), old)
            continue
        moved = [
            np.where(mask[path], np.asarray(model[path], np.float32) - old, np.float32(0))
            for mask, model in zip(masks, models, strict=True)
            if path in mask
        ]
        grafted[path] = old + np.float32(weight) * np.sum(moved, axis=0)
    return narrow(grafted, base)


def _learn(
    base, model, sample, share, num_passes, learning_rate, batch_size, keeps_share, penalty, validation,
    exclude, whole, seed, series,
):  # fmt: skip
    """({path: bool}, report) of one task."""
    learned_on, held = sample.split(validation, seed=seed) if validation else (sample, sample)
    moving, still = split(base, sample)
    taken = matching(moving, whole, "whole")
    left = [path for path in matching(moving, exclude, "exclude") if path not in taken]
    scope = [path for path in moving if path not in taken and path not in left]
    if not scope:
        raise ConfigError(f"exclude={exclude!r} and whole={whole!r} leave no leaf to learn a mask for.")
    tuned = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(model).items() if path in moving}
    vectors = {path: tuned[path] - np.asarray(moving[path]) for path in scope}
    size = sum(leaf.size for leaf in vectors.values())
    count = math.floor(share * size + 1e-9)
    first = largest({path: np.abs(leaf) for path, leaf in vectors.items()}, count)
    everything = {path: np.ones(tuned[path].shape, bool) for path in taken}
    fixed = {
        "still": {**still, **{path: moving[path] for path in left}, **{path: tuned[path] for path in taken}},
        "base": {path: moving[path] for path in scope},
        "vector": vectors,
        "first": {path: leaf.astype(np.float32) for path, leaf in first.items()},
        "penalty": np.float32(penalty),
    }
    key = named_key(jax.random.key(seed), "graft")
    start = {path: jax.random.uniform(named_key(key, path), leaf.shape) for path, leaf in vectors.items()}
    num_batches = max(1, len(learned_on) // min(batch_size, len(learned_on)))
    fixed["unit"] = _unit(_gradient_of(sample.forward, start, fixed, learned_on))

    def round_mask(logits):
        flips = {path: np.asarray(logits[path], np.float64) - SHIFT for path in scope}
        says = {path: np.where(first[path], -flip, flip) for path, flip in flips.items()}  # logit of the mask
        mask = largest(says, count) if keeps_share else {path: logit > 0 for path, logit in says.items()}
        return {**mask, **everything}

    def score(logits):
        found = measure(apply_masks(base, [model], [round_mask(logits)]), held)
        return found["accuracy"] + 1 / (2 * len(held) * (1 + found["loss"]))  # of equal accuracies the lower loss

    recipe = Recipe(num_passes * num_batches, learning_rate, batch_size, "sgd", clip_norm=None, momentum=0.0)
    found = fit(mask_loss, start, fixed, learned_on, recipe=recipe, score=score, seed=seed, series=series)
    mask = round_mask(found.numbers)
    models = {"base": base, "finetuned": model, "magnitude": apply_masks(base, [model], [{**first, **everything}])}
    models["graft"] = apply_masks(base, [model], [mask])
    info = {name: measure(params, held) for name, params in models.items()}
    info |= {
        "retained": info["graft"]["accuracy"] / max(info["finetuned"]["accuracy"], 1e-9),
        "share_at_start": count_true(first) / size,
        "share": count_true({path: mask[path] for path in scope}) / size,
        "pass": found.step // num_batches,
        "scores": found.scores,
        "loss": found.losses,
    }
    return mask, info


def mask_loss(forward: Any, logits: Any, fixed: Any, batch: Mapping[str, Any], key: jax.Array) -> jax.Array:
    """Cross-entropy of the graft, whose gradient for S is that for the mask, in units of the first one."""
    del key

    def mask_of(path):
        first, soft = fixed["first"][path], jax.nn.sigmoid(logits[path] - SHIFT)
        # The value is σ(S - 10), the gradient that of S: σ' would hold still what is far from the middle.
        passed = fixed["unit"] * (logits[path] - jax.lax.stop_gradient(logits[path]))
        return first + (1 - 2 * first) * (jax.lax.stop_gradient(soft) + passed)

    masks = {path: mask_of(path) for path in logits}
    grafted = {path: fixed["base"][path] + mask * fixed["vector"][path] for path, mask in masks.items()}
    loss = weighted_mean(example_losses(forward(join(grafted, fixed["still"]), batch), batch), batch)
    size = sum(mask.size for mask in masks.values())
    return loss + fixed["penalty"] * sum(jnp.sum(mask) for mask in masks.values()) / size


def _gradient_of(forward, logits, fixed, sample):
    """Of the first examples, at most 256."""
    batch = next(sample.take(np.arange(min(256, len(sample)))).chunks(min(256, len(sample))))
    return _gradient(forward, logits, {**fixed, "unit": np.float32(1)}, batch, jax.random.key(0))


@partial(jax.jit, static_argnums=0)
def _gradient(forward, logits, fixed, batch, key):
    return jax.grad(mask_loss, argnums=1)(forward, logits, fixed, batch, key)


def _unit(gradient):
    """One over the root mean square of all entries; 1 where all are 0."""
    leaves = [np.asarray(leaf, np.float64) for leaf in gradient.values()]
    square = sum(np.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves)
    return np.float32(1 / math.sqrt(square)) if square > 0 else np.float32(1)
