"""A decision: an ordinary recipe in the place of one with examples, and what to say about it."""

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import checkpoint
from jaxtune.checkpoint import Checkpoint
from jaxtune.compose.registry import METHODS as LEARNED_METHODS
from jaxtune.compose.registry import compose
from jaxtune.deciding.search import search_options
from jaxtune.deciding.task_models import (
    TaskModels,
    change,
    open_task_models,
    rank,
    score_candidates,
    score_experts,
    with_teachers,
)
from jaxtune.errors import UnknownNameError
from jaxtune.evaluate.fisher import estimate_fisher, save_fisher
from jaxtune.evaluate.grams import save_grams
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS as MERGE_METHODS
from jaxtune.moments import gather_grams
from jaxtune.recipes.examples import LEARNED
from jaxtune.recipes.nodes import did_you_mean
from jaxtune.recipes.options import option_kinds
from jaxtune.recipes.parameters import evaluate
from jaxtune.recipes.schema import Recipe
from jaxtune.train.checkpoints import StateSeries
from jaxtune.types import Params

ESTIMATES = {"fishers": "fisher", "grams": "gram"}
WITHOUT_TOKENIZER = {"tokenizer_source": None, "tokenizer": None, "chat_template": None}


@dataclass(frozen=True)
class Decision:
    """What examples decided.

    Attributes:
        recipe: To be merged now; it has no examples.
        asked: The recipe that was given.
        facts: For report.json: what was chosen, by how many examples of what, and the scores of the data-free default
            beside those of the choice.
        notes: For readers of the report and the card.
        inputs: Models that went in.
    """

    recipe: Recipe
    asked: Recipe
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    inputs: tuple[Checkpoint, ...]


def decide(recipe: Recipe, work: Path) -> Decision:
    """Lets the examples of a recipe decide.

    Args:
        recipe: With `data`.
        work: Folder for what the merge is to read: Fishers, Grams, a model that was learned. It must stay until then.

    Raises:
        RecipeError: names line and key of what cannot be: a model without examples, an unknown option, nothing to
            choose.
        JaxtuneError: as the method.
    """
    models = open_task_models(recipe)
    if recipe.merge_method in LEARNED:
        made, default, facts = _learn(models, work)
        held, chosen_by = facts.pop("held"), "kept apart" if recipe.data.validation else "those that were learned on"
    else:
        made, default, facts = _choose(models, work)
        held, chosen_by = facts.pop("held"), facts.pop("chosen_by")
    held = with_teachers(models, held)
    experts = score_experts(models, held)
    before, after = score_candidates([models.merge(default), models.merge(made)], held)
    names = [""] if models.is_together else [str(entry.model) for entry in recipe.models]
    facts |= {
        "method": recipe.merge_method,
        "examples": {name: len(sample) for name, sample in zip(names, models.samples, strict=True)},
        "seed": recipe.data.seed,
        "validation": {
            "examples": [len(sample) for sample in held],
            "which": chosen_by,
            "default": {"recipe": _short(default), "scores": before},
            "chosen": {"scores": after},
            "models": experts,
        },
    }
    scores = [rank(one, experts)[0] for one in (before, after)]
    what = "accuracy" if "accuracy" in after[0] else "agreement with the models"
    beside = "" if experts is None or what != "accuracy" else " (each as a share of the model's own)"
    words = "better than" if scores[1] > scores[0] else "as good as" if scores[1] == scores[0] else "WORSE than"
    note = (
        f"data: {recipe.merge_method}{_words(facts.get('options'))} is {words} {_name(default)} on validation examples "
        f"({chosen_by}): mean {what}{beside} {scores[1]:.4f}; without examples {scores[0]:.4f}"
    )
    inputs = {one.path: one for one in (models.base, *models.finetuned) if one is not None}
    return Decision(made, recipe, facts, (*facts.pop("notes", ()), note), tuple(inputs.values()))


def _learn(models: TaskModels, work: Path):
    """(recipe, data-free default, facts) of a method that is learned."""
    recipe, data = models.recipe, models.recipe.data
    if models.base is None:
        raise recipe.error_at("merge_method", f"{recipe.merge_method} needs base_model, that the others started from.")
    method = LEARNED_METHODS[recipe.merge_method]
    if method.samples == "together" and not models.is_together:
        raise data.node.get("sources").error(f"{recipe.merge_method} takes one source for all models: sources: PATH.")
    if method.samples == "a model" and models.is_together:
        raise data.node.get("sources").error(f"{recipe.merge_method} takes a source for each model: {{MODEL: PATH}}.")
    options = _options(recipe, method)
    if "validation" in method.options:
        options.setdefault("validation", data.validation)
    groups = models.groups()
    if "groups" in method.options and options.get("partition", 1) == 1:
        options["groups"] = groups
    trees = [model.params for model in models.finetuned]
    with contextlib.ExitStack() as stack:
        if "series" in inspect.signature(method.run).parameters:
            options["series"] = stack.enter_context(StateSeries(work / "states"))
        try:
            found = compose(recipe.merge_method, models.base.params, trees, models.samples, seed=data.seed, **options)
        except UnknownNameError as error:
            raise recipe.error_at("parameters", str(error)) from error
    options.pop("series", None)
    share = options.get("validation", 0.0)
    held = [sample.split(share, seed=data.seed)[1] if share else sample for sample in models.samples]
    facts = {"held": held, "options": {k: v for k, v in options.items() if k != "groups"}}
    learned = found.coefficients
    if "groups" in options and isinstance(learned, Mapping) and learned.keys() <= {"", *groups.values()}:
        made = _with_weights(models, learned)
        facts["coefficients"] = {name: np.asarray(c).tolist() for name, c in learned.items()}
    else:
        if recipe.post:
            raise recipe.error_at("post", f"what {recipe.merge_method} learned is a model, and no step may follow it.")
        made = _as_it_is(models, found.params, work)
        if isinstance(learned, Mapping) and all(np.ndim(one) == 0 for one in learned.values()):
            facts["coefficients"] = dict(learned)
    facts["history"] = {name: found.info[name] for name in ("step", "kept", "score") if name in found.info}
    default = change(
        recipe, merge_method="task_arithmetic", models=_bare(recipe), parameters={"lambda": 0.3}, preset=None
    )
    return made, default, facts


def _with_weights(models: TaskModels, learned: Mapping[str, Any]) -> Recipe:
    """Task arithmetic with a weight for each stored tensor of each model."""
    entries = _bare(models.recipe)
    named = models.stored_names()
    for n, entry in enumerate(entries):
        if set(learned) == {""}:
            entry["parameters"] = {"weight": float(learned[""][n])}
            continue
        weights = {name: float(learned[group][n]) for group, names in named.items() for name in names}
        # A filter is part of a name, and the first that fits decides: longer names come first.
        order = sorted(weights, key=lambda name: (-len(name), name))
        rows = [{"filter": name, "value": weights[name]} for name in order]
        entry["parameters"] = {"weight": [*rows, {"value": float(np.mean(list(weights.values())))}]}
    return change(models.recipe, merge_method="task_arithmetic", models=entries, parameters=None, preset=None)


def _choose(models: TaskModels, work: Path):
    """(recipe, data-free default, facts) of a merge method: what it needs is estimated, its options are searched."""
    recipe, data = models.recipe, models.recipe.data
    method = MERGE_METHODS[recipe.merge_method]
    entries, notes = list(recipe.plain["models"]), []
    needed = next((kind for word, kind in ESTIMATES.items() if word in method.data), None)
    learned_on, held, chosen_by = models.samples, models.samples, "those that chose"
    default = change(recipe)
    if needed is not None:
        if models.is_together:
            raise data.node.get("sources").error(
                f"{recipe.merge_method} takes a source for each model: {{MODEL: PATH}}."
            )
        if any(entry.data is not None for entry in recipe.models):
            raise data.node.error("a model names a file of 'data' of its own: keep that, or the examples.", at_key=True)
        pairs = [sample.split(data.validation, seed=data.seed) if data.validation else (sample, sample)
                 for sample in models.samples]  # fmt: skip
        learned_on, held = ([pair[n] for pair in pairs] for n in range(2))
        chosen_by = "kept apart" if data.validation and not data.search else "those that chose"
        entries = [
            {**entry, "data": str(_estimate(needed, model, sample, work / f"data-{n}"))}
            for n, (entry, model, sample) in enumerate(zip(_entries(recipe), models.finetuned, learned_on, strict=True))
        ]
        default = change(recipe, merge_method="linear", models=_bare(recipe), parameters={"weight": 1.0},
                         base_model=None, preset=None, post=None, **WITHOUT_TOKENIZER)  # fmt: skip
        notes.append(f"data: {method.data} estimated on {', '.join(str(len(one)) for one in learned_on)} examples")
    search = dict(data.search)
    if not search and needed is None:
        if "lambda" not in method.options:
            raise data.node.error(
                f"nothing to decide: {recipe.merge_method} learns nothing from examples. Write search: "
                f"{{OPTION: [...]}} with one of its options: {', '.join(method.options)}.",
                at_key=True,
            )
        search = {"lambda": tuple(round(0.1 * n, 1) for n in range(1, 16))}
    facts: dict[str, Any] = {"held": held, "chosen_by": chosen_by, "notes": notes}
    if needed == "gram" and models.like.layout.codec is None:
        return _merge_ours(models, entries, work), default, facts
    # Beside a base these methods would ask for what it needs too; it goes in as one more model, or not at all.
    made = change(recipe, models=entries, **({} if needed is None else {"base_model": None}))
    if search:
        made, facts["options"], facts["search"] = search_options(models, made, search, with_teachers(models, held))
    return made, default, facts


def _merge_ours(models: TaskModels, entries, work: Path) -> Recipe:
    """A merge by Grams of checkpoints in our own names, whose matrices have their inputs first: in memory.

    Files of other libraries have them last, and so streams take them.
    """
    recipe, method = models.recipe, MERGE_METHODS[models.recipe.merge_method]
    if recipe.data.search or recipe.post:
        key = "data" if recipe.data.search else "post"
        raise recipe.error_at(key, f"{recipe.merge_method} of models in our own names takes no search and no post.")
    options: dict[str, Any] = {}
    for name in method.options:
        given = [entry.parameters.get(name, recipe.parameters.get(name)) for entry in recipe.models]
        kind = option_kinds(method)[name]
        if name in method.per_model:
            values = [None if one is None else evaluate(one.conditions[0], 0.0, kind) for one in given]
            options[name] = [method.options[name] if one is None else one for one in values]
        elif name in recipe.parameters:
            options[name] = evaluate(recipe.parameters[name].conditions[0], 0.0, kind)
    extras = [checkpoint.load(entry["data"], config={}).params for entry in entries]
    merged = merge_trees(method, [one.params for one in models.finetuned], extras=extras, seed=recipe.seed, **options)
    return _as_it_is(models, merged, work)


def _as_it_is(models: TaskModels, params: Params, work: Path) -> Recipe:
    """A recipe that takes a model as it is, in the layout of the base."""
    checkpoint.save(work / "learned", params, like=models.like, overwrite=True)
    entry = {"model": str(work / "learned")}
    return change(
        models.recipe, merge_method="passthrough", models=[entry], base_model=None, parameters=None, preset=None,
        **WITHOUT_TOKENIZER,
    )  # fmt: skip


def _estimate(kind, model, sample, place):
    if kind == "fisher":
        save_fisher(place, estimate_fisher(model.params, sample), model, overwrite=True)
    else:
        save_grams(place, gather_grams(model.params, sample), model, overwrite=True)
    return place


def _options(recipe, method) -> dict[str, Any]:
    """Options of a learned method, from the recipe's parameters."""
    for entry in recipe.models:
        for setting in entry.parameters.values():
            raise setting.node.error(f"{recipe.merge_method} learns what each model has: take this out.", at_key=True)
    options = {}
    for name, setting in recipe.parameters.items():
        known = {option: default for option, default in method.options.items() if option not in ("seed", "groups")}
        if name not in known:
            words = f"unknown parameter {name!r} of {recipe.merge_method}.{did_you_mean(name, known)}"
            raise setting.node.error(words, at_key=True)
        kind = {bool: "bool", int: "int", float: "float", str: "str"}.get(type(known[name]))
        if kind is None:
            options[name] = setting.node.plain
            continue
        options[name] = evaluate(setting.conditions[0], 0.0, kind)
    return options


def _entries(recipe):
    return [entry if isinstance(entry, dict) else {"model": entry} for entry in recipe.plain["models"]]


def _bare(recipe):
    """Models without parameters."""
    return [{"model": entry["model"]} for entry in _entries(recipe)]


def _short(recipe):
    return {
        key: value for key, value in recipe.plain.items() if key in ("merge_method", "parameters", "preset", "post")
    }


def _name(recipe):
    return recipe.merge_method + (_words(recipe.plain.get("parameters")) or " as it is")


def _words(options):
    values = ", ".join(f"{key} {value}" for key, value in (options or {}).items())
    return f" ({values})" if values else ""
