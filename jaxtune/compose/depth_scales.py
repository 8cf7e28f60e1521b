"""LiNeS with its strength searched: how much less early layers move than late ones, by examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.compose.composition import Composition, check_models, check_samples
from jaxtune.compose.scoring import score_all, score_logits, share_of
from jaxtune.compose.vectors import narrow, widen
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.evaluate.candidates import combine_candidates
from jaxtune.evaluate.logits import Logits
from jaxtune.evaluate.many import score_many
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.post_steps import Place, balance_norms, find_places
from jaxtune.merge.registry import METHODS as MERGE_METHODS
from jaxtune.sample import Sample
from jaxtune.tree import flatten, is_float, task_vector
from jaxtune.types import Params

STRENGTHS = tuple(round(0.1 * n, 1) for n in range(11))


def lines(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    merge_method: str = "task_arithmetic",
    options: Mapping[str, Any] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    places: Mapping[str, Place] | None = None,
    outside: str = "first",
    seed: int = 0,
) -> Composition:
    """`θ_0 + s_l τ` with `s_l = α + β l / (L - 1)` in layer l of L, α or β chosen by examples.

    One model (and two samples, its task's and a control's): every α of `strengths` with β = 1 - α, chosen by
    `2 (target / fine-tuned) + (control / base)`. Several: α follows from norms, `‖Σ τ_t‖₁ / (T ‖τ_merged‖₁)`, and β is
    the strength with the best mean accuracy, each divided by its fine-tune's.

    Args:
        base, finetuned: As `registry.compose`.
        samples: With labels; of one model the target's and a control's, else one a model.
        merge_method, options: How several become one, at scale 1: a key of `merge.registry.METHODS`, and its options.
        strengths: Of α, or of β.
        places: Path -> place in its stack; None: as `merge.post_steps.find_places` reads paths, two towers by
            themselves.
        outside: Leaves outside the stacks move as its "first" layer, its "last", or those before it as the first and
            the final norm and head (a folder or leaf that begins with `final_norm` or `head`) as the last: "both".
        seed: Of the merge.

    Returns:
        `coefficients`: {"alpha", "beta"}; `info`: "scores" of every strength, "validation": scores of every task at the
        plain model's scale 1 ("start") and at the chosen one ("learned").

    Raises:
        UnknownNameError: no such merge method, or `outside`.
        ConfigError, DataError, TreeMismatchError, NonFiniteError: models, samples or numbers make no sense.

    Reference:
        Wang et al. 2024, arXiv:2410.17146. Differs: layers come from the places of leaves, and not from substrings; one
        layer has α + β.
    """
    if merge_method not in MERGE_METHODS:
        raise unknown_name("merge method", merge_method, MERGE_METHODS)
    if outside not in ("first", "last", "both"):
        raise unknown_name("outside", outside, ("first", "last", "both"))
    strengths = np.asarray(strengths, np.float64)
    if strengths.ndim != 1 or not len(strengths) or not np.isfinite(strengths).all():
        raise ConfigError(f"strengths must be a list of finite numbers, got {strengths.tolist()}.")
    check_models(base, finetuned)
    is_single = len(finetuned) == 1
    if is_single and len(samples) != 2:
        raise ConfigError(f"of one model two samples are needed, its task's and a control's; got {len(samples)}.")
    check_samples(samples if is_single else finetuned, samples, is_labelled=True)
    merged = finetuned[0]
    alphas, betas = strengths, 1 - strengths
    if not is_single:
        merged = merge_trees(MERGE_METHODS[merge_method], finetuned, base, seed=seed, **(options or {}))
        alphas, betas = np.full(len(strengths), balance_norms(finetuned, merged, base)), strengths
    places = find_places(flatten(base)) if places is None else places
    paths = [path for path, leaf in flatten(base).items() if is_float(leaf)]
    scales = np.stack([_scale(places[path], path, alphas, betas, outside) for path in paths], axis=1)
    scales = np.concatenate([scales, np.ones((1, len(paths)))])[:, None, :]  # the last is the plain merge
    candidates = combine_candidates(base, [task_vector(base, merged)], scales)
    found = [
        [
            score_logits(logits, sample.batch)
            for logits in score_many(candidates, Logits(sample.forward), sample)["logits"]
        ]
        for sample in samples
    ]  # [task][candidate]
    experts = [widen(finetuned[0]), widen(base)] if is_single else [widen(params) for params in finetuned]
    best = [one["accuracy"] for one in score_all(experts, samples)]
    weights = np.array([2.0, 1.0]) if is_single else np.full(len(samples), 1 / len(samples))
    shares = np.array([[share_of(one["accuracy"], b) for one in task] for task, b in zip(found, best, strict=True)])
    scores = weights @ shares
    chosen = int(np.argmax(scores[:-1]))
    info = {
        "scores": {float(s): float(score) for s, score in zip(strengths, scores[:-1], strict=True)},
        "validation": {"start": [task[-1] for task in found], "learned": [task[chosen] for task in found]},
    }
    learned = {"alpha": float(alphas[chosen]), "beta": float(betas[chosen])}
    return Composition(narrow(candidates.take(chosen), base), info, learned)


def _scale(place, path, alphas, betas, outside):
    if place.layer is None:
        is_behind = any(word.startswith(("final_norm", "head")) for word in path.split("/"))
        is_last = outside == "last" or (outside == "both" and is_behind)
        return alphas + betas if is_last else alphas
    return alphas + betas * (place.layer / (place.num_layers - 1) if place.num_layers > 1 else 1.0)
