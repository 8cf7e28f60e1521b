"""Several merges in one file: which names which, and the order in which they are made."""

import os
from collections.abc import Iterator, Mapping, Sequence

from jaxtune.recipes.references import ModelReference
from jaxtune.recipes.schema import Recipe


def order_recipes(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """Recipes in an order in which each comes behind those that it names; else as they stand in the file.

    Raises:
        RecipeError: two of one name, two without one, or a circle.
    """
    names: dict[str | None, Recipe] = {}
    for recipe in recipes:
        for name in names_of(recipe) or (None,):
            if name in names and names[name] is not recipe:
                what = f"two merges are called {name!r}" if name else "two merges without a name"
                raise recipe.node.error(f"{what}. Give each a name of its own; the last may have none.")
            names[name] = recipe
    done: list[Recipe] = []
    open_ones: list[Recipe] = []

    def visit(recipe):
        if any(recipe is one for one in done):
            return
        if any(recipe is one for one in open_ones):
            circle = " -> ".join(one.name or "(no name)" for one in [*open_ones, recipe])
            raise recipe.node.error(f"merges that need each other: {circle}.")
        open_ones.append(recipe)
        for needed in needs(recipe, names):
            visit(names[needed])
        open_ones.pop()
        done.append(recipe)

    for recipe in recipes:
        visit(recipe)
    return tuple(done)


def names_of(recipe: Recipe) -> tuple[str, ...]:
    """What other merges of its file may call a merge."""
    return tuple(dict.fromkeys(_normal(name) for name in (recipe.name, recipe.out_path) if name))


def needs(recipe: Recipe, names: Mapping[str | None, Recipe]) -> list[str]:
    """Which of the names a recipe takes models from."""
    paths = {_normal(path) for reference in references_of(recipe) for path in (reference.path, reference.lora) if path}
    return [name for name in names if name is not None and name in paths]


def made_name(path: str, made: Mapping[str, object]) -> str | None:
    """The name among `made` that a path in a recipe stands for."""
    return next((name for name in made if _normal(name) == _normal(path)), None)


def references_of(recipe: Recipe) -> Iterator[ModelReference]:
    """Every model that a recipe names: the base first, then in the order of the text."""
    if recipe.base_model is not None:
        yield recipe.base_model
    groups = [recipe] if recipe.modules is None else list(recipe.modules.values())
    for group in groups:
        for part in group.slices or ():
            if part.base_model is not None:
                yield part.base_model
        entries = [*(group.models or ()), *(entry for part in group.slices or () for entry in part.sources)]
        for entry in entries:
            yield entry.model
            if entry.transport is not None:
                yield entry.transport.base
    if recipe.tokenizer is not None and isinstance(recipe.tokenizer.source, ModelReference):
        yield recipe.tokenizer.source


def _normal(name: str) -> str:
    return os.path.normpath(name)
