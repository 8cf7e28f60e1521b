"""Recipes made of a recipe: without its examples, with other numbers, or what is merged where there are no examples."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxtune import checkpoint
from jaxtune.checkpoint import Checkpoint
from jaxtune.merge.registry import METHODS
from jaxtune.recipes.examples import LEARNED
from jaxtune.recipes.nodes import nodes_of
from jaxtune.recipes.parsing import parse_recipe
from jaxtune.recipes.schema import Recipe
from jaxtune.types import Params

SOUPS = ("best_k_soup", "greedy_soup", "learned_soup")  # of models of one task; they need no base
ESTIMATES = {"fishers": "fisher", "grams": "gram"}  # what a merge method asks for -> what is estimated
WITHOUT_TOKENIZER = {"tokenizer_source": None, "tokenizer": None, "chat_template": None}


def has_base(method: str) -> bool:
    """Whether what is merged in the end may name a base: averages by Fishers and Grams, and of soups, may not."""
    return method not in SOUPS and (method in LEARNED or not any(word in METHODS[method].data for word in ESTIMATES))


def change(recipe: Recipe, **keys: Any) -> Recipe:
    """The recipe without its examples and with other values of some keys; None takes a key out."""
    plain = {key: value for key, value in {**recipe.plain, "data": None, **keys}.items() if value is not None}
    made = parse_recipe(nodes_of(plain, name=recipe.node.place.split(",")[0]), recipe.folder)
    return dataclasses.replace(made, seed=recipe.seed)


def task_arithmetic(recipe: Recipe) -> Recipe:
    """Task arithmetic at the scale that papers use where there are no examples."""
    return change(recipe, merge_method="task_arithmetic", models=bare_entries(recipe), parameters={"lambda": 0.3},
                  preset=None, post=None, **WITHOUT_TOKENIZER)  # fmt: skip


def task_negation(recipe: Recipe) -> Recipe:
    """Minus the first model's task vector, at the same scale; the second, of the control, adds nothing."""
    models = [
        {**entry, "parameters": {"weight": w}} for entry, w in zip(bare_entries(recipe), (-1.0, 0.0), strict=True)
    ]
    return change(recipe, merge_method="task_arithmetic", models=models, parameters={"lambda": 0.3},
                  preset=None, post=None, **WITHOUT_TOKENIZER)  # fmt: skip


def mean(recipe: Recipe) -> Recipe:
    """The mean of the models."""
    return change(recipe, merge_method="linear", models=bare_entries(recipe), parameters={"weight": 1.0},
                  base_model=None, preset=None, post=None, **WITHOUT_TOKENIZER)  # fmt: skip


def as_it_is(recipe: Recipe, params: Params, like: Checkpoint, work: Path) -> Recipe:
    """A recipe that takes a model as it is, in the layout of another."""
    checkpoint.save(work / "learned", params, like=like, overwrite=True)
    entry = {"model": str(work / "learned")}
    return change(
        recipe, merge_method="passthrough", models=[entry], base_model=None, parameters=None, preset=None,
        **WITHOUT_TOKENIZER,
    )  # fmt: skip


def entries(recipe: Recipe) -> list[dict[str, Any]]:
    """Models with what stands beside them."""
    return [entry if isinstance(entry, dict) else {"model": entry} for entry in recipe.plain["models"]]


def bare_entries(recipe: Recipe) -> list[dict[str, Any]]:
    """Models without parameters."""
    return [{key: entry[key] for key in ("model", "transport") if key in entry} for entry in entries(recipe)]
