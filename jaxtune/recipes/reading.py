"""Reads recipes: a YAML file, its text, or the same keys and values in Python."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtune.merge.registry import METHODS
from jaxtune.recipes.chain import order_recipes
from jaxtune.recipes.examples import LEARNED
from jaxtune.recipes.nodes import RecipeError, nodes_of, read_nodes
from jaxtune.recipes.parsing import parse_recipe
from jaxtune.recipes.schema import Recipe

MAX_BYTES = 4 << 20  # of a recipe's file


def read_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """Reads a recipe of one merge.

    Args:
        source: Path of a YAML file; YAML text (more than one line); or keys and values, also an ml_collections
            ConfigDict.

    Raises:
        RecipeError: names file, line, column, key, and the nearest known key.
    """
    recipes = read_recipes(source)
    if len(recipes) != 1:
        raise recipes[1].node.error(
            f"a file of {len(recipes)} merges where one is asked for. Read it with read_recipes, or split it."
        )
    return recipes[0]


def read_recipes(source: str | Path | Mapping[str, Any], *, seed: int | None = None) -> tuple[Recipe, ...]:
    """Reads every merge of a file, documents apart by "---", in the order in which they can be made.

    A merge may name another by its `name` or `out_path`; `chain.order_recipes` says which comes first. A `seed` given
    here stands in the place of theirs.

    Raises:
        RecipeError: as `read_recipe`; two merges of one name, or a circle of them.
    """
    folder = None
    if isinstance(source, Mapping) or hasattr(source, "to_dict"):
        nodes = [nodes_of(source)]
    else:
        text, name, folder = _read_text(source)
        nodes = read_nodes(text, name)
        if not nodes:
            raise RecipeError(f"{name}: empty. A recipe has at least merge_method and models.")
    recipes = [parse_recipe(node, folder) for node in nodes]
    if seed is not None:
        recipes = [replace(recipe, seed=seed, plain={**recipe.plain, "seed": seed}) for recipe in recipes]
    return order_recipes(recipes)


def without_examples(recipe: Recipe) -> Recipe:
    """An ordinary recipe of the same models, for plans: what examples will decide is left at its defaults."""
    if recipe.data is None:
        return recipe
    keys = {key: value for key, value in recipe.plain.items() if key != "data"}
    needs_more = recipe.merge_method in LEARNED or METHODS[recipe.merge_method].data != "none"
    if needs_more:
        models = [{"model": one["model"]} if isinstance(one, dict) else {"model": one} for one in keys["models"]]
        method = "linear" if recipe.base_model is None else "task_arithmetic"
        keys = {key: value for key, value in keys.items() if key not in ("parameters", "preset", "post")}
        keys |= {"merge_method": method, "models": models, "parameters": {"weight": 1.0}}
    else:
        first = {name: values[0] for name, values in recipe.data.search.items()}  # some options have no default
        keys["parameters"] = first | (keys.get("parameters") or {})
    made = parse_recipe(nodes_of(keys, name=recipe.node.place.split(",")[0]), recipe.folder)
    return replace(made, seed=recipe.seed)


def _read_text(source) -> tuple[str, str, Path | None]:
    if isinstance(source, str) and "\n" in source.strip():
        return source, "the recipe", None
    path = Path(source)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size} bytes; a recipe has at most {MAX_BYTES}.")
        return path.read_text("utf-8"), str(path), path.parent
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}. Expected a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text at byte {error.start}. Expected a YAML file.") from error
