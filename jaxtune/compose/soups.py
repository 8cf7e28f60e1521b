"""Soups: models of one base and one task, averaged; which of them, a held-out metric says.

Every soup is a row of weights over the ingredients. Ingredients and candidate soups are evaluated as rows of one
program (`evaluate.many`); a soup exists as parameters only when it is the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtune.compose.composition import Composition, check_models
from jaxtune.compose.soup_pot import Metric, Pot, average, is_better, order_of
from jaxtune.errors import ConfigError, DataError, unknown_name
from jaxtune.sample import Sample
from jaxtune.types import Params

KINDS = ("uniform", "greedy", "best_k")


def uniform_soup(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    metric: str | Metric = "accuracy",
    mode: str | None = None,
    include_base: bool = False,
    seed: int = 0,
) -> Composition:
    """The mean of all models; examples say how good it is, and mend the statistics of batch norms.

    Args:
        base: What all were fine-tuned from; its dtypes are the result's.
        finetuned: The ingredients.
        samples: One, labelled, held out from their training: of a source that `jaxtune.compose` opens,
            `split="validation"`.
        metric: "accuracy", "balanced_accuracy", "loss", "calibration_error", or a function of parameters; of language
            models "accuracy", "loss", "perplexity".
        mode: "max" or "min"; None: as the metric is named, "max" for a function.
        include_base: Whether the base is an ingredient too, the last one.
        seed: Not used; there is nothing to draw.

    Returns:
        `coefficients`: float64[models], their weights. `info`: "scores" of the ingredients, "order" of them by these,
        "accepted" in the order in which they came, "score" of the soup on the same examples, which it was chosen by
        where there was a choice: report on others.

    Raises:
        ConfigError: no model, or an unknown metric or mode.
        DataError: more or fewer samples than one, or no labels.
        TreeMismatchError: the models differ in a path or a shape.

    Reference:
        Wortsman et al. 2022, arXiv:2203.05482.
    """
    del seed
    return _cook("uniform", base, finetuned, samples, metric, mode, include_base)


def greedy_soup(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    metric: str | Metric = "accuracy",
    mode: str | None = None,
    accept_ties: bool = False,
    include_base: bool = False,
    seed: int = 0,
) -> Composition:
    """From the best model on, each next one joins if the mean with it is better.

    One pass in the order of the ingredients' own scores; equal ones stay in the order in which they were given.

    Args:
        accept_ties: Whether a model also joins where the score stays the same, as in the paper's pseudocode; its
            released code is strict.
        base, finetuned, samples, metric, mode, include_base, seed: As `uniform_soup`.

    Returns:
        As `uniform_soup`; `info` has "steps" too: model, score with it, whether it joined.

    Raises:
        ConfigError, DataError, TreeMismatchError: as `uniform_soup`.

    Reference:
        Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """
    del seed
    return _cook("greedy", base, finetuned, samples, metric, mode, include_base, accept_ties=accept_ties)


def best_k_soup(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    k: int | None = None,
    metric: str | Metric = "accuracy",
    mode: str | None = None,
    include_base: bool = False,
    seed: int = 0,
) -> Composition:
    """The mean of the k best models.

    Args:
        k: How many. None: as many as score best together, the fewest of equals; all are tried in one program.
        base, finetuned, samples, metric, mode, include_base, seed: As `uniform_soup`.

    Returns:
        As `uniform_soup`; `info` has "scores_of_k" too, of the best one, the best two and so on, where all were tried.

    Raises:
        ConfigError: k is below 1 or above the number of models; as `uniform_soup`.
        DataError, TreeMismatchError: as `uniform_soup`.

    Reference:
        Wortsman et al. 2022, arXiv:2203.05482, appendix.
    """
    del seed
    return _cook("best_k", base, finetuned, samples, metric, mode, include_base, k=k)


@dataclass(frozen=True)
class Ingredient:
    """A model and where it comes from, for instance the data mixture that it was tuned on.

    Attributes:
        name: Unique among the ingredients.
        params: The model.
        metadata: Whatever a report should tell.
    """

    name: str
    params: Params
    metadata: Mapping[str, Any] = field(default_factory=dict)


def cook_mixtures(
    ingredients: Sequence[Ingredient],
    metric: Metric,
    *,
    kind: str = "greedy",
    mode: str = "max",
    accept_ties: bool = False,
    k: int | None = None,
) -> Composition:
    """A soup over models that were tuned on different mixtures of data, by a metric of the caller's own.

    Args:
        ingredients: The same model, tuned with different data sets.
        metric: Parameters -> a number; it is asked once for every candidate, on validation data.
        kind: One of `KINDS`.
        mode: "max" or "min".
        accept_ties: As in `greedy_soup`.
        k: As in `best_k_soup`.

    Returns:
        As `uniform_soup`, in the dtypes of the first ingredient; `info` has "ingredients" too: name, metadata, score,
        weight. Statistics of batch norms are averaged: `interpolate.repair.reset_statistics` mends them.

    Raises:
        ConfigError: no ingredient, two of one name, or a number out of range.
        UnknownNameError: no such kind.
        TreeMismatchError: the models differ in a path or a shape.

    Reference:
        Liu et al. 2024, arXiv:2409.04828 (POINTS): greedy soups over data mixtures.
    """
    names = [one.name for one in ingredients]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"ingredients need names of their own, got: {', '.join(names) or 'none'}.")
    models = [one.params for one in ingredients]
    found = _choose(kind, Pot(models, None, metric, mode), models[0], accept_ties=accept_ties, k=k)
    listed = [
        {"name": one.name, "metadata": dict(one.metadata), "score": score, "weight": float(weight)}
        for one, score, weight in zip(ingredients, found.info["scores"], found.coefficients, strict=True)
    ]
    return Composition(found.params, {**found.info, "ingredients": listed}, found.coefficients)


def _cook(kind, base, finetuned, samples, metric, mode, include_base, **options):
    check_models(base, finetuned)
    if len(samples) != 1:
        raise DataError(f"a soup is of models of one task and takes one sample, got {len(samples)}.")
    models = [*finetuned, base] if include_base else list(finetuned)
    return _choose(kind, Pot(models, samples[0], metric, mode), base, **options)


def _choose(kind, pot, like, *, accept_ties=False, k=None):
    """The soup of one kind, in the dtypes of `like`."""
    if kind not in KINDS:
        raise unknown_name("kind of soup", kind, KINDS)
    if k is not None and not 1 <= k <= pot.num_models:
        raise ConfigError(f"k is {k}; of {pot.num_models} models it must be 1 to {pot.num_models}.")
    scores = pot.score_models()
    order = order_of(scores, pot.mode)
    pot.lead_with(order[0])
    chosen: list[int] = list(order)
    extra: dict[str, Any] = {}
    if kind == "greedy":
        chosen, extra = _greedy(pot, scores, order, accept_ties)
    elif kind == "best_k":
        if k is None:
            tried = pot.score([average(order[:n], pot.num_models) for n in range(1, pot.num_models + 1)])
            tried = [scores[order[0]], *tried[1:]]
            k = 1 + order_of(tried, pot.mode)[0]
            extra = {"scores_of_k": tried}
        chosen = order[:k]
    weights = average(chosen, pot.num_models)
    params = pot.make(weights, like)
    score = scores[chosen[0]] if len(chosen) == 1 else extra.get("score")
    if score is None:
        score = pot.score([weights])[0]
    info = {"scores": scores, "order": order, "accepted": chosen, "score": score, "mode": pot.mode} | extra
    return Composition(params, info, weights)


def _greedy(pot: Pot, scores: Sequence[float], order: Sequence[int], accept_ties: bool):
    """(models in the soup, what to report)."""
    chosen, best, steps = [order[0]], scores[order[0]], []
    for model in order[1:]:
        score = pot.score([average([*chosen, model], pot.num_models)])[0]
        joins = is_better(score, best, pot.mode) or (accept_ties and score == best)
        steps.append({"model": model, "score": score, "joined": joins})
        if joins:
            chosen, best = [*chosen, model], score
    return chosen, {"steps": steps, "score": best}
