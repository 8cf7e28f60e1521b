"""Merge methods whose options, or what they need beside weights, come from examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune import checkpoint
from jaxtune.compose.fisher import draw_coefficients, fisher_candidates
from jaxtune.compose.scoring import score_logits
from jaxtune.compose.vectors import widen
from jaxtune.deciding.search import combine_values, is_complete, search_options, with_options
from jaxtune.deciding.task_models import TaskModels, rank, score_experts, share_out, with_teachers
from jaxtune.deciding.variants import ESTIMATES, as_it_is, change, entries, mean
from jaxtune.evaluate.fisher import estimate_fisher, save_fisher
from jaxtune.evaluate.grams import save_grams
from jaxtune.evaluate.logits import Logits
from jaxtune.evaluate.many import score_many
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS
from jaxtune.moments import gather_grams
from jaxtune.recipes.options import option_kinds
from jaxtune.recipes.parameters import evaluate_once
from jaxtune.recipes.schema import Recipe
from jaxtune.sample import Sample
from jaxtune.types import Params

SAVE = {"fisher": save_fisher, "gram": save_grams}
NUM_WEIGHTS = 51  # candidates for the weights of Fishers


def choose_recipe(models: TaskModels, work: Path) -> tuple[Recipe, Recipe, dict[str, Any]]:
    """(recipe, data-free default, facts) of a merge method: what it needs is estimated, its options are searched."""
    recipe, data = models.recipe, models.recipe.data
    method = METHODS[recipe.merge_method]
    with_data, notes = list(recipe.plain["models"]), []
    needed = next((kind for word, kind in ESTIMATES.items() if word in method.data), None)
    weighs = recipe.merge_method == "fisher" and not data.search and len(with_data) > 1 and not _says_weights(recipe)
    chooses = bool(needed is None or data.search or weighs)
    shares = share_out(models, learns=needed is not None, chooses=chooses)
    learned_on = choosing = shares.given
    default = change(recipe)
    if needed is not None:
        if models.is_together:
            raise data.node.get("sources").error(
                f"{recipe.merge_method} takes a source for each model: {{MODEL: PATH}}."
            )
        if any(entry.data is not None for entry in recipe.models):
            raise data.node.error("a model names a file of 'data' of its own: keep that, or the examples.", at_key=True)
        if shares.own:
            pairs = [sample.split(shares.own, seed=data.seed) for sample in shares.given]
            learned_on, choosing = ([pair[n] for pair in pairs] for n in range(2))
        found = [_estimate(needed, model, sample) for model, sample in zip(models.finetuned, learned_on, strict=True)]
        with_data = []
        for n, (entry, model, one) in enumerate(zip(entries(recipe), models.finetuned, found, strict=True)):
            SAVE[needed](work / f"data-{n}", one, model, overwrite=True)
            with_data.append({**entry, "data": str(work / f"data-{n}")})
        default = mean(recipe)
        notes.append(f"data: {method.data} estimated on {', '.join(str(len(one)) for one in learned_on)} examples")
    search = dict(data.search)
    if not search and needed is None:
        if "lambda" not in method.options:
            way = f"Write search: {{OPTION: [...]}} with one of its options: {', '.join(method.options)}."
            raise data.node.error(
                f"nothing to decide: {recipe.merge_method} learns nothing from examples"
                + (f". {way}" if method.options else ", and has no options to choose among: take 'data' out."),
                at_key=True,
            )
        search = {"lambda": tuple(round(0.1 * n, 1) for n in range(1, 16))}
    if needed is None and models.is_together and not models.samples[0].is_labelled:
        raise data.node.get("sources").error(
            "one source for all models, and no labels in it: nothing says which candidate is better. Give labels, or a "
            "source for each model ({MODEL: PATH}), whose own predictions then decide."
        )
    if needed is None and search and not is_complete(default):
        default = with_options(default, combine_values(search)[0])
    facts: dict[str, Any] = {"held": shares.judges, "chosen_by": shares.which, "notes": notes}
    if needed == "gram" and models.like.layout.codec is None:
        return _merge_ours(models, with_data, work), default, facts
    # A base would be one more model for these methods, and would need Fishers or Grams of its own.
    made = change(recipe, models=with_data, **({} if needed is None else {"base_model": None}))
    if weighs:
        weights, facts["search"] = _weigh_fishers(models, found, with_teachers(models, choosing))
        with_data = [
            {**entry, "parameters": {**(entry.get("parameters") or {}), "weight": weight}}
            for entry, weight in zip(with_data, weights, strict=True)
        ]
        facts["options"] = {"weight": weights}
        made = change(recipe, models=with_data, base_model=None)
    if search:
        made, facts["options"], facts["search"] = search_options(models, made, search, with_teachers(models, choosing))
    return made, default, facts


def _says_weights(recipe):
    return any("weight" in level for level in (recipe.parameters, *(entry.parameters for entry in recipe.models)))


def _merge_ours(models: TaskModels, with_data, work: Path) -> Recipe:
    """A merge by Grams of checkpoints in our own names, whose matrices have their inputs first: in memory.

    Files of other libraries have them last, and so streams take them.
    """
    recipe, method = models.recipe, METHODS[models.recipe.merge_method]
    if recipe.data.search or recipe.post:
        key = "data" if recipe.data.search else "post"
        raise recipe.error_at(key, f"{recipe.merge_method} of models in our own names takes no search and no post.")
    options: dict[str, Any] = {}
    for name in method.options:
        given = [entry.parameters.get(name, recipe.parameters.get(name)) for entry in recipe.models]
        kind = option_kinds(method)[name]
        if name in method.per_model:
            values = [None if one is None else evaluate_once(one, kind, recipe.merge_method) for one in given]
            options[name] = [method.options[name] if one is None else one for one in values]
        elif name in recipe.parameters:
            options[name] = evaluate_once(recipe.parameters[name], kind, recipe.merge_method)
    extras = [checkpoint.load(entry["data"], config={}).params for entry in with_data]
    merged = merge_trees(method, [one.params for one in models.finetuned], extras=extras, seed=recipe.seed, **options)
    return as_it_is(recipe, merged, models.like, work)


def _estimate(kind, model, sample):
    if kind == "fisher":
        return estimate_fisher(model.params, sample)
    return gather_grams(model.params, sample)


def _weigh_fishers(
    models: TaskModels, fishers: Sequence[Params], samples: Sequence[Sample]
) -> tuple[list[float], list[dict[str, Any]]]:
    """λ of every model, chosen by examples among `compose.fisher.draw_coefficients`; and what each candidate scored."""
    recipe, kinds = models.recipe, option_kinds(METHODS["fisher"])
    options = {
        name: evaluate_once(recipe.parameters[name], kinds[name], recipe.merge_method)
        for name in ("normalize", "floor", "favor_target")
        if name in recipe.parameters
    }
    weights = draw_coefficients(len(fishers), NUM_WEIGHTS, seed=recipe.data.seed)
    candidates = fisher_candidates([widen(one.params) for one in models.finetuned], fishers, weights, **options)
    logits = [score_many(candidates, Logits(sample.forward), sample)["logits"] for sample in samples]
    experts, tried = score_experts(models, samples), []
    for n, row in enumerate(weights.tolist()):
        scores = [score_logits(one[n], sample.batch) for one, sample in zip(logits, samples, strict=True)]
        score, loss = rank(scores, experts)
        tried.append({"options": {"weight": row}, "score": score, "loss": -loss})
    best = min(range(len(tried)), key=lambda n: (-tried[n]["score"], tried[n]["loss"], n))
    return tried[best]["options"]["weight"], tried
