"""Options of a merge method, as every level of a recipe sets them, for each tensor."""

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.errors import JaxtuneError
from jaxtune.merge.method import REQUIRED, Method
from jaxtune.merge.options import check_counts
from jaxtune.merge.registry import METHODS
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.parameters import Parameters, Resolver
from jaxtune.recipes.parts import Part
from jaxtune.recipes.schema import Recipe

# Methods in which mergekit takes a base for one more model: it has a weight like all others.
BASE_IS_A_MODEL = ("linear", "passthrough", "karcher")
# Parameters of mergekit that change how it computes and not what.
OPTION = re.compile(r"option '(\w+)'")  # as messages about values name it
WITHOUT_EFFECT = {"int8_mask": "it saves memory in mergekit and does not change the result"}


class PartOptions:
    """Options for the tensors of one part.

    Args:
        recipe, part: What was asked for.
        labels: Of the part's sources.
        problems: Takes what is wrong, each once.

    Attributes:
        sources: Positions of the models in `part.sources`, without the base.
        base: Position of the base; None where the method has none.
        is_base_alone: Whether a method of task vectors is given none: the result is the base.
    """

    def __init__(self, recipe: Recipe, part: Part, labels: Sequence[str], problems: list[str]):
        self.method, self._problems = METHODS[recipe.merge_method], problems
        self._name, self._labels, self._part, self._place = recipe.merge_method, labels, part, part.node
        self.base = None if self._name in BASE_IS_A_MODEL or self.method.base == "none" else part.base
        self.sources = tuple(at for at in range(len(part.sources)) if at != self.base)
        defaults = self.method.options | _preset(recipe, self.method)
        kinds = option_kinds(self.method)
        self._shared: dict[str, Resolver] = {}
        self._own: dict[str, list[Resolver]] = {}
        for option, default in defaults.items():
            if option in self.method.per_model:
                self._own[option] = [
                    Resolver(_levels(option, (part.sources[at].parameters, *part.levels)), kinds[option], default)
                    for at in self.sources
                ]
            else:
                self._shared[option] = Resolver(_levels(option, part.levels), kinds[option], default)
        # Most options are the same for all tensors at one depth; only those with filters are looked up by name.
        self._filtered = [(option, resolve) for option, resolve in self._shared.items() if resolve.has_filters]
        self._own_filtered = [
            (option, at, resolve)
            for option, each in self._own.items()
            for at, resolve in enumerate(each)
            if resolve.has_filters
        ]
        self._made: dict[tuple, Mapping[str, Any]] = {}
        self._is_bad = False
        self.is_base_alone = not self.sources and (self.method.base, self.method.num_models) == ("needs", (1, None))
        if not self.is_base_alone:
            self._check_counts(part, recipe)
        self._check_weights(part)

    def at(self, name: str, names: Sequence[str], t: float) -> Mapping[str, Any]:
        """All options for one tensor.

        Args:
            name: In the output; filters of shared options look at it.
            names: In each of the sources without the base; filters of their own options look at these.
            t: Depth, 0 the first layer of the part and 1 the last.
        """
        key = (t, *(resolve(name, t) for _, resolve in self._filtered))
        key += tuple(resolve(names[at], t) for _, at, resolve in self._own_filtered)
        made = self._made.get(key)
        if made is None:
            made = {option: resolve(name, t) for option, resolve in self._shared.items()}
            for option, each in self._own.items():
                made[option] = tuple(resolve(own, t) for resolve, own in zip(each, names, strict=True))
            self._made[key] = made
            self._check(made, name)
        return made

    def _check(self, options, name):
        missing = [option for option, value in options.items() if value is REQUIRED]
        for option in missing:
            self._complain(
                f"{self._name} needs the parameter {option!r}, and no level says it for {name}: write it under "
                "'parameters'."
            )
        for option, values in options.items():
            if option in self.method.per_model and REQUIRED in values:
                missing.append(option)
                whose = ", ".join(
                    self._labels[at] for at, value in zip(self.sources, values, strict=True) if value is REQUIRED
                )
                self._complain(
                    f"{self._name} needs the parameter {option!r} of every model, and no level says it for {name} of "
                    f"{whose}: write it under 'parameters'."
                )
        if not missing and self.method.check is not None and not self._is_bad:
            try:
                self.method.check(options)
            except JaxtuneError as error:
                self._is_bad = True  # the first tensor stands for all
                self._complain(f"{name}: {error}", self._find_place(str(error)))

    def _check_counts(self, part, recipe):
        is_base_named = recipe.base_model is not None or part.node.get("base_model") is not None
        is_missing = self.method.base == "may" and is_base_named and self._name not in BASE_IS_A_MODEL
        if part.base is None and is_missing:
            self._complain(f"{self._name} takes base_model for the base of a slice: name it among the sources too.")
            return
        if part.base is None and self.method.base == "needs":
            self._complain(
                f"{self._name} works on task vectors and needs a base: write base_model, the model that the others "
                "were fine-tuned from; with slices, name it among the sources too."
            )
            return
        if part.base is not None and self.method.base == "none" and self._name not in BASE_IS_A_MODEL:
            self._complain(f"{self._name} takes no base: leave base_model out, or name it among the models.")
            return
        try:
            check_counts(self.method, len(self.sources), has_base=self.base is not None, name=f"{self._name}")
        except JaxtuneError as error:
            self._complain(f"{error} Here: {', '.join(self._labels)}.")

    def _check_weights(self, part):
        """A weight for some models and none for others is an oversight: a default beside them would tip the scales."""
        said = {at: bool(_levels("weight", (part.sources[at].parameters, *part.levels))) for at in self.sources}
        if "weight" in self._own and any(said.values()) and not all(said.values()):
            lacking = [at for at, is_said in said.items() if not is_said]
            silent = ", ".join(self._labels[at] for at in lacking)
            self._complain(
                f"{self._name}: some models have a weight, and {silent} has none. Write one for it"
                + ("." if part.base in self.sources else ", 0 to leave it out.")
                + (f" {self._name} takes base_model for one more model." if self._name in BASE_IS_A_MODEL else ""),
                part.sources[lacking[0]].node,
            )

    def _find_place(self, words):
        """Where the recipe says the first of the options that a message names."""
        levels = [*(one.parameters for one in self._part.sources), *self._part.levels]
        said = (_levels(option, levels) for option in OPTION.findall(words))
        return next((settings[0].node for settings in said if settings), self._place)

    def _complain(self, words, place=None):
        # The first tensor or layer stands for all others that lack the same.
        text = (place or self._place).error(words).args[0]
        if not any(known.split(", and no level")[0] == text.split(", and no level")[0] for known in self._problems):
            self._problems.append(text)


def option_kinds(method: Method) -> dict[str, str]:
    """Option -> kind of its values, by its annotation, or its default."""
    kinds = {}
    for parameter in inspect.signature(method.program).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        words = parameter.annotation
        words = getattr(words, "__name__", str(words)) if isinstance(words, type) else str(words)
        default = parameter.default
        if "bool" in words and "str" in words:
            kind = "switch"
        elif "Literal" in words or "str" in words:
            kind = "str"
        elif "bool" in words or isinstance(default, bool):
            kind = "bool"
        elif "float" in words or isinstance(default, float):
            kind = "float"
        elif words == "int" or words.startswith(("tuple[int", "int |")) or isinstance(default, int):
            kind = "int"
        else:
            kind = "str" if isinstance(default, str) else "float"
        kinds[parameter.name.rstrip("_")] = kind
    return kinds


def check_names(recipe: Recipe, levels: Sequence[tuple[Parameters, bool]]) -> list[str]:
    """Checks the names of all parameters of a recipe; gives notes on those without effect.

    Args:
        recipe: For its method.
        levels: Every level, and whether it belongs to one model.

    Raises:
        RecipeError: a name that no merge method has; names the nearest.
    """
    method, notes = METHODS[recipe.merge_method], []
    known = method.options
    everywhere = {option for one in METHODS.values() for option in one.options}
    for parameters, is_of_model in levels:
        for name, setting in parameters.items():
            if name in known:
                if is_of_model and name not in method.per_model:
                    notes.append(
                        f"{setting.node.path}: {name} is one for all models in {recipe.merge_method}; of a single "
                        "model it has no effect. Write it under the recipe's parameters."
                    )
            elif name in WITHOUT_EFFECT:
                notes.append(f"{setting.node.path}: no effect here: {WITHOUT_EFFECT[name]}")
            elif name in everywhere or name in ("density", "rescale", "normalize"):
                notes.append(f"{setting.node.path}: {recipe.merge_method} has no parameter {name}; it has no effect")
            else:
                near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, everywhere, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise setting.node.error(
                    f"unknown parameter {name!r} of {recipe.merge_method}.{hint} Known: "
                    f"{', '.join(sorted(known)) or '(none)'}.",
                    at_key=True,
                )
    return list(dict.fromkeys(notes))


def _preset(recipe: Recipe, method: Method) -> dict[str, Any]:
    """Defaults of the peer whose conventions are asked for; mergekit's where a recipe says nothing."""
    if recipe.preset is None:
        return dict(method.presets.get("mergekit", {}))
    if recipe.preset not in method.presets and recipe.preset != "mergekit":
        raise _unknown_preset(recipe, method)
    return dict(method.presets.get(recipe.preset, {}))


def _unknown_preset(recipe, method) -> RecipeError:
    near = difflib.get_close_matches(recipe.preset, method.presets, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = ", ".join(sorted({*method.presets, "mergekit"}))
    return recipe.error_at("preset", f"{recipe.merge_method} has no preset {recipe.preset!r}.{hint} Known: {known}.")


def _levels(option, levels):
    return [level[option] for level in levels if option in level]
