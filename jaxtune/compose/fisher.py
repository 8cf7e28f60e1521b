"""Fisher-weighted averaging with its coefficients searched for: every candidate is evaluated, the best is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compose.composition import Composition, check_models, check_samples
from jaxtune.errors import ConfigError
from jaxtune.evaluate.candidates import Candidates
from jaxtune.evaluate.fisher import estimate_fisher
from jaxtune.evaluate.language import evaluate_sample
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS as MERGE_METHODS
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.teach.descent import round_to
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Params


def fisher_search(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    labels: str = "exact",
    normalize: bool = True,
    floor: float = 1e-6,
    favor_target: bool = True,
    num_candidates: int = 51,
    validation: float = 0.5,
    chunk_size: int = 8,
    seed: int = 0,
) -> Composition:
    """`Σ λ_i F_i θ_i / Σ λ_i F_i`, F_i estimated on a part of each model's sample and λ chosen on the rest.

    Of two models the candidates lie on a grid over the segment, ends included; of more they are the even one and draws
    from Dirichlet(1). All are evaluated by one program. The best has the highest mean accuracy over the tasks, among
    equals the lowest mean loss, then the first.

    Args:
        base: Gives the dtypes of the result.
        finetuned: The models; the first is the target of `favor_target`.
        samples: Labelled examples of each model's task, or texts for a language model.
        labels: Of `evaluate.fisher.estimate_fisher`: "exact", "sampled" or "empirical".
        normalize, floor, favor_target: Of merge method "fisher".
        num_candidates: K.
        validation: Share of each sample that the choice is made by.
        chunk_size: Examples at a time, of the Fishers.
        seed: Of the split, the candidates and sampled labels.

    Returns:
        `coefficients`: float64[T], λ of the choice. `info["candidates"]`: of every one its λ, accuracies and losses on
        the validation part.

    Raises:
        ConfigError: fewer than two models, or a number out of range.
        DataError: a sample is empty, has no labels, or is too small to be split.

    Reference:
        Matena and Raffel 2022, arXiv:2111.09832. Differs: heads are merged like all else, and nothing is 0/0.
    """
    check_models(base, finetuned)
    check_samples(finetuned, samples, is_labelled=True)
    if len(finetuned) < 2 or num_candidates < 1:
        raise ConfigError(f"{len(finetuned)} models, {num_candidates} candidates: there is nothing to choose among.")
    parts = [sample.split(validation, seed=seed) for sample in samples]
    fishers = [
        estimate_fisher(model, learned, labels=labels, seed=seed, chunk_size=chunk_size)
        for model, (learned, _) in zip(finetuned, parts, strict=True)
    ]
    weights = draw_coefficients(len(finetuned), num_candidates, seed=seed)
    options = {"normalize": normalize, "floor": floor, "favor_target": favor_target}
    candidates = fisher_candidates(finetuned, fishers, weights, **options)
    metrics = [evaluate_sample(candidates, held) for _, held in parts]  # [tasks][candidates]
    accuracy = np.array([[one.accuracy for one in row] for row in metrics])
    loss = np.array([[one.loss for one in row] for row in metrics])
    best = min(range(len(weights)), key=lambda k: (-accuracy[:, k].mean(), loss[:, k].mean(), k))
    merged = merge_trees(MERGE_METHODS["fisher"], finetuned, extras=fishers, weight=weights[best].tolist(), **options)
    rows = [
        {"coefficients": weights[k].tolist(), "accuracy": accuracy[:, k].tolist(), "loss": loss[:, k].tolist()}
        for k in range(len(weights))
    ]
    return Composition(round_to(merged, base), {"chosen": best, "candidates": rows}, weights[best])


def draw_coefficients(num_models: int, count: int, *, seed: int = 0) -> np.ndarray:
    """float64[K, T]: a grid over the segment for two models, for more the even one and draws from Dirichlet(1)."""
    if num_models == 2:
        first = np.linspace(1.0, 0.0, count) if count > 1 else np.array([0.5])
        return np.stack([first, 1 - first], axis=-1)
    key = named_key(jax.random.key(seed), "coefficients")
    drawn = np.asarray(jax.random.dirichlet(key, jnp.ones(num_models), (count - 1,)), np.float64)
    return np.concatenate([np.full((1, num_models), 1 / num_models), drawn])


def fisher_candidates(
    models: Sequence[Params],
    fishers: Sequence[Params],
    weights: np.ndarray,
    *,
    normalize: bool = True,
    floor: float = 1e-6,
    favor_target: bool = True,
) -> Candidates:
    """One candidate for each row of coefficients, as merge method "fisher" makes it.

    Shapes:
        weights: float[K, T].
    """
    flats, scores = [flatten(model) for model in models], [flatten(fisher) for fisher in fishers]
    floats = [path for path, leaf in flats[0].items() if is_float(leaf)]
    lengths = np.ones(len(models))
    if normalize:
        squares = [sum(np.sum(np.square(one[path], dtype=np.float64)) for path in floats) for one in scores]
        lengths = np.sqrt([square if square > 0 else 1.0 for square in squares])
    shared: dict[str, Any] = {"models": {}, "fishers": {}, "fixed": {}}
    for path in floats:
        least = [floor if n == 0 or not favor_target else 0.0 for n in range(len(models))]
        raised = [np.maximum(one[path], low) / size for one, low, size in zip(scores, least, lengths, strict=True)]
        shared["fishers"][path] = np.stack(raised).astype(np.float32)
        shared["models"][path] = np.stack([np.asarray(one[path], np.float32) for one in flats])
    shared["fixed"] = {path: leaf for path, leaf in flats[0].items() if path not in shared["models"]}
    dtypes = tuple((path, flats[0][path].dtype.name) for path in floats)
    return Candidates(shared, np.asarray(weights, np.float32), FisherMix(dtypes))


@dataclass(frozen=True)
class FisherMix:
    """Builds one candidate of `fisher_candidates`.

    Attributes:
        dtypes: Of the result, by path.
    """

    dtypes: tuple[tuple[str, str], ...]

    def __call__(self, shared: Any, weights: jax.Array) -> Params:
        mixed = {}
        for path, dtype in self.dtypes:
            models, shares = shared["models"][path], shared["fishers"][path]
            shares = shares * weights.reshape(-1, *[1] * (models.ndim - 1))
            below = jnp.sum(shares, axis=0)
            weighed = jnp.sum(shares * models, axis=0) / jnp.where(below > 0, below, 1.0)
            mixed[path] = jnp.where(below > 0, weighed, jnp.mean(models, axis=0)).astype(dtype)
        return unflatten({**shared["fixed"], **mixed})
