"""One form for models, slices and modules: runs of output layers with their sources, their base and their levels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune import checkpoint
from jaxtune.errors import JaxtuneError
from jaxtune.recipes.nodes import Node, RecipeError, did_you_mean
from jaxtune.recipes.opening import Opened, open_reference, transported
from jaxtune.recipes.parameters import Parameters
from jaxtune.recipes.references import ModelReference, find_folder
from jaxtune.recipes.schema import Entry, Recipe
from jaxtune.tree import flatten


@dataclass(frozen=True)
class PartSource:
    """One model of a part.

    Attributes:
        index: In `Models.opened`.
        first_layer: Layer of this model that becomes the first of the part.
        parameters: The strongest level of its own.
        data: What the method needs beside weights, name of a tensor -> array; None where the entry names none.
    """

    index: int
    first_layer: int
    parameters: Parameters
    node: Node
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive layers of one module of the output.

    Attributes:
        sources: In the order of the recipe, the base among them.
        base: Position of the base in `sources`; None without one.
        num_layers: How many layers this part has.
        levels: Parameters of slice, module and recipe, the strongest first.
    """

    sources: tuple[PartSource, ...]
    base: int | None
    num_layers: int
    levels: tuple[Parameters, ...]
    node: Node


class Models:
    """Models of a recipe, each opened once.

    Attributes:
        opened: In the order in which they were first named.
        errors: What was wrong with those that could not be opened.
    """

    def __init__(self, folder: Path | None, made: Mapping[str, Any] | None):
        self.opened: list[Opened] = []
        self.errors: list[str] = []
        self._folder, self._made = folder, made
        self._index: dict[Any, int | None] = {}
        self._data: dict[str, Mapping[str, Any]] = {}

    def open(self, reference: ModelReference, node: Node) -> int | None:
        """Index of a model; None where it cannot be opened, which `errors` then says."""
        return self._remember(reference, lambda: open_reference(reference, node, self._folder, self._made))

    def open_entry(self, entry: Entry, target: ModelReference | None) -> int | None:
        """The same of an entry, which may have to be carried to the target first."""
        step = entry.transport
        if step is None:
            return self.open(entry.model, entry.node)
        if target is None:
            self.errors.append(step.node.error("a transport needs base_model: the base that it carries to.").args[0])
            return None
        parts = [self.open(entry.model, entry.node), self.open(step.base, step.node), self.open(target, entry.node)]
        if None in parts:
            return None
        model, base, onto = (self.opened[part] for part in parts)
        key = (entry.model, step.base, target, step.method, repr(sorted(step.options.items())))
        return self._remember(key, lambda: _transported(step, model, base, onto))

    def open_data(self, entry: Entry) -> Mapping[str, Any] | None:
        """An entry's data; None where it names none, or where it cannot be read, which `errors` then says."""
        if entry.data is not None and entry.data not in self._data:
            try:
                place = find_folder(entry.data, None, entry.node.value["data"], self._folder)
                self._data[entry.data] = flatten(checkpoint.load(place, config={}).params)
            except JaxtuneError as error:
                self.errors.append(str(error))
        return self._data.get(entry.data)

    def plain_index(self) -> dict[ModelReference, int]:
        """Model, as a recipe names it -> its index; of a model that is carried over, its own tensors' index."""
        return {key: at for key, at in self._index.items() if isinstance(key, ModelReference) and at is not None}

    def _remember(self, key, make):
        if key not in self._index:
            self._index[key] = None
            try:
                self.opened.append(make())
                self._index[key] = len(self.opened) - 1
            except JaxtuneError as error:
                self.errors.append(str(error))
        return self._index[key]


def _transported(step, model, base, onto):
    from jaxtune.recipes.carry import check_transport  # with it come our networks, and JAX

    opened = transported(model, base, onto, step.method, step.options)
    try:
        check_transport(opened.model)
    except JaxtuneError as error:
        raise step.node.error(str(error)) from error
    return opened


def open_models(recipe: Recipe, made: Mapping[str, Any] | None = None) -> Models:
    """Opens every model of a recipe, the base first; all that fail are reported at once.

    Raises:
        RecipeError: says of each model what is wrong.
    """
    models = Models(recipe.folder, made)
    base = recipe.base_model
    if base is not None:
        models.open(base, recipe.node.value["base_model"])
    for entry, target in _entries(recipe):
        models.open_entry(entry, target)
        models.open_data(entry)
    if recipe.tokenizer is not None and isinstance(recipe.tokenizer.source, ModelReference):
        models.open(recipe.tokenizer.source, recipe.tokenizer.node)
    if models.errors:
        errors = list(dict.fromkeys(models.errors))
        raise RecipeError(
            errors[0]
            if len(errors) == 1
            else f"{len(errors)} models cannot be opened:\n" + "\n".join(f"  {error}" for error in errors)
        )
    return models


def find_parts(recipe: Recipe, models: Models, out: Opened, problems: list[str]) -> dict[str, list[Part]]:
    """Parts of every module, in the order of the output.

    Args:
        recipe: What was asked for.
        models: Of it.
        out: The model that gives the output its layout.
        problems: Takes what is wrong.
    """
    stacks = out.architecture.stacks
    if recipe.slices is not None and len(stacks) > 1:
        names = ", ".join(stacks)
        raise recipe.error_at(
            "slices", f"{out.label} has {len(stacks)} stacks of layers ({names}): write modules, with slices for each."
        )
    if recipe.modules is None:
        groups = [(name, recipe.models, recipe.slices, {}, recipe.node) for name in stacks]
    else:
        groups = []
        for name, module in recipe.modules.items():
            known = _find_module(name, stacks)
            if known is None:
                raise module.node.error(f"unknown module {name!r} of {out.label}.{did_you_mean(name, stacks)}")
            groups.append((known, module.models, module.slices, module.parameters, module.node))
        missing = [name for name in stacks if name not in [group[0] for group in groups]]
        if missing:
            raise recipe.error_at("modules", f"{out.label} also has {', '.join(missing)}. Add each, or write models.")
    parts: dict[str, list[Part]] = {}
    for name, entries, slices, parameters, node in groups:
        levels = (parameters, recipe.parameters)
        if entries is not None:
            parts[name] = [_whole(recipe, models, name, entries, levels, node, problems)]
        else:
            parts[name] = [_slice(recipe, models, name, one, levels, problems) for one in slices]
    return parts


def _whole(recipe, models, module, entries, levels, node, problems) -> Part:
    """All layers of whole models; a base that is not among them goes last."""
    target = recipe.base_model
    sources = [_source(models, entry, target, 0) for entry in entries]
    base = None
    if target is not None:
        index = models.open(target, recipe.node)
        base = next((at for at, source in enumerate(sources) if source.index == index), None)
        if base is None:
            base = len(sources)
            sources.append(PartSource(index, 0, {}, recipe.node.value["base_model"]))
    counts = {models.opened[source.index].label: _num_layers(models, source, module) for source in sources}
    if len(set(counts.values())) > 1:
        where = "" if module == "default" else f" in {module}"
        problems.append(
            f"number of layers{where}: {_list_counts(counts)}. Name layers with slices and layer_range, or take models "
            "of one depth."
        )
    depth = min(counts.values())
    return _check(Part(tuple(sources), base, depth, ({}, *levels), node), models, problems)


def _source(models, entry, target, first_layer) -> PartSource:
    index, data = models.open_entry(entry, target), models.open_data(entry)
    return PartSource(index, first_layer, entry.parameters, entry.node, data)


def _slice(recipe, models, module, one, levels, problems) -> Part:
    target = one.base_model or recipe.base_model
    sources = []
    for entry in one.sources:
        source = _source(models, entry, target, entry.layer_range[0])
        sources.append(source)
        depth = _num_layers(models, source, module)
        if entry.layer_range[1] > depth:
            problems.append(
                entry.node.error(f"layer_range {list(entry.layer_range)}, and the model has {depth} layers.").args[0]
            )
    base = None
    if target is not None:
        index = models.open(target, recipe.node)
        base = next((at for at, source in enumerate(sources) if source.index == index), None)
    first, end = one.sources[0].layer_range
    return _check(Part(tuple(sources), base, end - first, (one.parameters, *levels), one.node), models, problems)


def _check(part, models, problems) -> Part:
    """No model twice."""
    seen: set[int] = set()
    for source in part.sources:
        if source.index in seen:
            label = models.opened[source.index].label
            problems.append(source.node.error(f"{label} goes in twice. Keep one, with the sum of the weights.").args[0])
        seen.add(source.index)
    return part


def _num_layers(models, source, module) -> int:
    stack = models.opened[source.index].architecture.stacks.get(module)
    return 0 if stack is None else stack.num_layers


def _find_module(name, stacks):
    """The module that a recipe means: by its name, or by that of its list of layers."""
    if name in stacks:
        return name
    return next((own for own, stack in stacks.items() if stack and stack.prefix.rstrip("._/") == name), None)


def _entries(recipe: Recipe) -> Iterable[tuple[Entry, ModelReference | None]]:
    """Every entry, and the base that it goes with."""
    groups = [recipe] if recipe.modules is None else list(recipe.modules.values())
    for group in groups:
        for entry in group.models or ():
            yield entry, recipe.base_model
        for one in group.slices or ():
            for entry in one.sources:
                yield entry, one.base_model or recipe.base_model


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {count}" for label, count in counts.items())
