"""Methods that are learned from examples, as recipes: weights of stored tensors, or a model that is taken as it is."""

import contextlib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.compose.registry import HIDDEN, METHODS, compose
from jaxtune.deciding.task_models import TaskModels, share_out
from jaxtune.deciding.variants import SOUPS, as_it_is, bare_entries, change, mean, task_arithmetic, task_negation
from jaxtune.errors import DataError, UnknownNameError
from jaxtune.recipes.nodes import did_you_mean
from jaxtune.recipes.parameters import evaluate_once
from jaxtune.recipes.schema import Recipe
from jaxtune.train.checkpoints import StateSeries

# For the few dozen steps that a few hundred examples make; papers go through whole sets at a tenth of these rates. What
# they bring: docs/results.md. `preset: paper` leaves methods at their own defaults.
FEW = {
    "ada_merging": {"objective": "expert", "learning_rate": 1e-2, "num_steps": 300, "is_best_kept": True},
    "ada_rank": {"objective": "expert", "learning_rate": 1e-2, "num_steps": 300, "is_best_kept": True},
    "atlas": {"start": 0.3, "learning_rate": 1e-2, "num_epochs": 60},
    "sca_learn": {"mean": 0.3, "num_epochs": 20},
}
KINDS = {bool: "bool", int: "int", float: "float", str: "str", Sequence[float]: "numbers"}  # what a recipe can say
ONLY_CHOOSE = ("best_k_soup", "greedy_soup", "lines")  # nothing is learned between what they choose among
KEEPS_LAST = ("atlas_test_time", "lot", "mergetune", "regmean_plus")  # or solves in one go


def learn_recipe(models: TaskModels, work: Path) -> tuple[Recipe, Recipe, dict[str, Any]]:
    """(recipe, data-free default, facts) of a method that is learned."""
    recipe, data = models.recipe, models.recipe.data
    is_soup = recipe.merge_method in SOUPS
    if models.base is None and not is_soup:
        raise recipe.error_at("merge_method", f"{recipe.merge_method} needs base_model, that the others started from.")
    method = METHODS[recipe.merge_method]
    if method.samples == "together" and not models.is_together:
        raise data.node.get("sources").error(f"{recipe.merge_method} takes one source for all models: sources: PATH.")
    if method.samples == "a model" and models.is_together:
        raise data.node.get("sources").error(f"{recipe.merge_method} takes a source for each model: {{MODEL: PATH}}.")
    if recipe.preset not in (None, "paper"):
        raise recipe.error_at("preset", f"{recipe.merge_method} has no preset {recipe.preset!r}. Known: paper.")
    if method.samples == "target and control" and len(models.finetuned) != 2:
        raise recipe.error_at("models", f"{recipe.merge_method} takes two models: of the task to lose, and a control.")
    few = FEW.get(recipe.merge_method, {}) if recipe.preset is None else {}
    options = few | _options(recipe, method)
    said = options.pop("validation", None)
    shares = share_out(
        models, said, learns=recipe.merge_method not in ONLY_CHOOSE,
        chooses=_chooses(recipe, method.options | options),
        by_class=method.data == "labelled examples",  # others are to find the same where there are no labels
    )  # fmt: skip
    if "validation" in method.options:
        options["validation"] = shares.own
    groups = models.groups()
    if "groups" in method.options and options.get("partition", 1) == 1:
        options["groups"] = groups
    trees = [model.params for model in models.finetuned]
    with contextlib.ExitStack() as stack:
        takes = inspect.signature(method.run).parameters
        if "series" in takes:
            options["series"] = stack.enter_context(StateSeries(work / "states"))
        elif "states" in takes:  # a search for each model
            options["states"] = [stack.enter_context(StateSeries(work / f"states-{n}")) for n in range(len(trees))]
        try:
            found = compose(recipe.merge_method, models.like.params, trees, shares.given, seed=data.seed, **options)
        except UnknownNameError as error:
            raise recipe.error_at("parameters", str(error)) from error
        except DataError as error:
            raise data.node.get("sources").error(str(error)) from error
    options = {name: value for name, value in options.items() if name not in HIDDEN}
    if "validation" in options:
        options["validation"] = data.validation if said is None else said  # as it was asked for
    facts = {"held": shares.judges, "options": {k: v for k, v in options.items() if k != "groups"}}
    facts["chosen_by"] = shares.which
    learned = found.coefficients
    if "groups" in options and isinstance(learned, Mapping) and learned.keys() <= {"", *groups.values()}:
        made = _with_weights(models, learned)
        facts["coefficients"] = {name: np.asarray(c).tolist() for name, c in learned.items()}
    else:
        if recipe.post:
            raise recipe.error_at("post", f"what {recipe.merge_method} learned is a model, and no step may follow it.")
        made = as_it_is(recipe, found.params, models.like, work)
        if isinstance(learned, Mapping) and all(np.ndim(one) == 0 for one in learned.values()):
            facts["coefficients"] = dict(learned)
    facts["history"] = {name: found.info[name] for name in ("step", "kept", "score") if name in found.info}
    is_negation = method.samples == "target and control"
    free = mean if is_soup else task_negation if is_negation else task_arithmetic
    return made, free(recipe), {**facts, "is_negation": is_negation}


def _chooses(recipe, options):
    """Whether the method picks what it keeps by examples: one that always keeps its last step does not."""
    return recipe.merge_method not in KEEPS_LAST and options.get("is_best_kept", True)


def _with_weights(models: TaskModels, learned: Mapping[str, Any]) -> Recipe:
    """Task arithmetic with a weight for each stored tensor of each model."""
    entries = bare_entries(models.recipe)
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


def _options(recipe, method) -> dict[str, Any]:
    """Options of a learned method, from the recipe's parameters."""
    for entry in recipe.models:
        for setting in entry.parameters.values():
            raise setting.node.error(f"{recipe.merge_method} learns what each model has: take this out.", at_key=True)
    parameters, options = inspect.signature(method.run).parameters, {}
    known = {name: _kind_of(parameters[name].annotation) for name in method.options if name != "seed"}
    known = {name: kind for name, kind in known.items() if kind is not None}
    for name, setting in recipe.parameters.items():
        if name not in known:
            words = f"unknown parameter {name!r} of {recipe.merge_method}.{did_you_mean(name, known)}"
            raise setting.node.error(words, at_key=True)
        options[name] = evaluate_once(setting, known[name], recipe.merge_method)
    return options


def _kind_of(annotation):
    """What a recipe may write for an option; None where trees, functions or tables are wanted."""
    several = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    members = typing.get_args(annotation) if several else (annotation,)
    return next((kind for member, kind in KINDS.items() if member in members), None)
