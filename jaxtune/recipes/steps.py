"""Post-steps of a recipe: names, options and values checked before anything is read."""

from dataclasses import replace
from typing import Any

from jaxtune.errors import JaxtuneError
from jaxtune.merge.method import REQUIRED
from jaxtune.merge.post_steps import POST_STEPS
from jaxtune.recipes.nodes import Node, did_you_mean
from jaxtune.recipes.options import option_kinds
from jaxtune.recipes.parameters import convert
from jaxtune.recipes.schema import Recipe

FILLED_IN = ("place",)  # by whoever runs the step
# The strength of LiNeS for several tasks, which is read off the models: `stream.balance` puts the number in its place.
BALANCED = "balanced"


def check_steps(recipe: Recipe) -> Recipe:
    """The recipe with the values of all options of its post-steps as the steps take them.

    Raises:
        RecipeError: no such step or option, one that is missing, or a value that makes no sense.
    """
    node = recipe.node.get("post")
    return replace(recipe, post=tuple(_check(node.value[at], *step) for at, step in enumerate(recipe.post)))


def is_balanced(name: str, options: Any) -> bool:
    """Whether a step's strength is to be read off the models."""
    return name == "lines" and options.get("alpha") == BALANCED


def _check(place: Node, name: str, options: Any) -> tuple[str, dict[str, Any]]:
    if name not in POST_STEPS:
        raise place.error(f"unknown post-step {name!r}.{did_you_mean(name, POST_STEPS)}")
    step = POST_STEPS[name]
    known = {option: default for option, default in step.options.items() if option not in FILLED_IN}
    kinds, found = option_kinds(step), {}
    for option in options:
        if option not in known:
            raise place.error(f"unknown option {option!r} of {name}.{did_you_mean(option, known)}")
        value = place.value[name].get(option)
        if value is None:
            continue
        if isinstance(value.value, dict | tuple):
            raise value.error("expected one value: post-steps are the same for all tensors.")
        is_word = is_balanced(name, {option: value.value})
        found[option] = BALANCED if is_word else convert(kinds[option], value.value, value)
    missing = [option for option, default in known.items() if default is REQUIRED and option not in found]
    if missing:
        words = f", a number or {BALANCED!r}" if name == "lines" else ""
        raise place.error(f"{name} needs the option {missing[0]!r}{words}: write {{{name}: {{{missing[0]}: ...}}}}.")
    if step.check is not None:
        try:
            step.check({**known, **found})
        except JaxtuneError as error:
            raise place.error(str(error)) from error
    return name, found
