"""Options of a merge method, chosen by examples: combinations are merged in memory and evaluated, many at a time."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtune.deciding.task_models import GROUP, TaskModels, rank, score_candidates, score_experts
from jaxtune.deciding.variants import change
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.resolve import resolve
from jaxtune.recipes.schema import Recipe
from jaxtune.sample import Sample


def search_options(
    models: TaskModels, recipe: Recipe, search: Mapping[str, Sequence[Any]], samples: Sequence[Sample]
) -> tuple[Recipe, dict[str, Any], list[dict[str, Any]]]:
    """Tries every combination, and the recipe as it is; the best by `rank`, the first of equals.

    Args:
        recipe: Without examples, with all that is not searched.
        search: Option -> values.
        samples: That decide.

    Returns:
        The recipe with the options that were chosen, these options, and what each combination scored.

    Raises:
        RecipeError: a model sets an option that is searched for all.
        JaxtuneError: as the merge.
    """
    for entry in recipe.models:
        for name in search:
            if name in entry.parameters:
                raise entry.parameters[name].node.error(f"{name} is searched for all models: take it out here.")
    experts = score_experts(models, samples)
    tried: list[dict[str, Any]] = []
    best, chosen = None, None
    combinations = combine_values(search)
    if is_complete(recipe):
        combinations = [{}, *combinations]
    for some in _in_groups(combinations):
        recipes = [with_options(recipe, options) for options in some]
        scores = score_candidates([models.merge(one) for one in recipes], samples)
        for options, one, score in zip(some, recipes, scores, strict=True):
            place = rank(score, experts)
            tried.append({"options": options, "score": place[0], "loss": -place[1]})
            if best is None or place > best:
                best, chosen = place, (one, options)
    return (*chosen, tried)


def combine_values(search: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last option turning fastest."""
    return [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]


def is_complete(recipe: Recipe) -> bool:
    """Whether a recipe can be merged without more options: some methods have one without a default."""
    try:
        resolve(recipe)
    except RecipeError:
        return False
    return True


def with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """The recipe with some parameters of all models set."""
    return change(recipe, parameters={**(recipe.plain.get("parameters") or {}), **options})


def _in_groups(values) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(values), GROUP):
        yield values[start : start + GROUP]
