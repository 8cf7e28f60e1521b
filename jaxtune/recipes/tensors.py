"""One job a tensor of the output: which tensors go into it, at which depth, in which dtypes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.merge.registry import METHODS
from jaxtune.recipes.architecture import Place
from jaxtune.recipes.jobs import Source, TensorJob
from jaxtune.recipes.opening import Opened
from jaxtune.recipes.options import PartOptions
from jaxtune.recipes.parts import Part
from jaxtune.recipes.schema import Recipe
from jaxtune.recipes.tokenizers import Vocabulary

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
_WHOLE = frozenset("iub")  # kinds of dtypes that are copied


class Wanted(NamedTuple):
    """One tensor of the output before its job is made.

    Attributes:
        name: In the output.
        place: In the architecture of the output.
        names: In each source of the part, the base among them; None where it has none.
        t: Depth in the part.
        layer: In the output.
    """

    name: str
    place: Place
    names: tuple[str | None, ...]
    t: float
    layer: int | None
    num_layers: int | None


class Names:
    """Tensors of one model by place, each under the name that the output has for it outside of the layers.

    Args:
        model: Whose.
        out: The model that gives the output its names; a file of the trunk alone lacks their first word.
    """

    def __init__(self, model: Opened, out: Opened):
        self.model = model
        self._layers: dict[tuple[str, int], dict[str, str]] = {}
        self._others: dict[str, str] = {}
        drop, add = _first_words(model, out)
        for name, place in model.architecture.places.items():
            if name in model.computed or name in model.ties:
                continue
            if place.layer is not None:
                self._layers.setdefault((place.module, place.layer), {})[place.part] = name
            else:
                known = name in out.tensors
                self._others[name if known or not name.startswith(drop) else add + name[len(drop) :]] = name
        self.ties = {self._rename(one, out, drop, add): original for one, original in model.ties.items()}

    def layer(self, module: str, number: int) -> dict[str, str]:
        """Part -> stored name, of one layer."""
        return self._layers.get((module, number), {})

    @property
    def others(self) -> dict[str, str]:
        """Name in the output -> stored name, of all that is in no layer and repeats nothing."""
        return self._others

    def find(self, name: str) -> str | None:
        """Stored name of a tensor outside of the layers; of one that repeats another, that other's."""
        return self._others.get(name) or self.ties.get(name)

    @staticmethod
    def _rename(name, out, drop, add):
        if name in out.tensors or name in out.ties or not name.startswith(drop):
            return name
        return add + name[len(drop) :]


def walk_module(
    module: str, parts: Sequence[Part], names: Sequence[Names], out: Opened, problems: list[str]
) -> Iterator[tuple[Part, list[Wanted]]]:
    """What a module of the output is made of: first the tensors before its layers, then its layers, then the rest.

    Args:
        names: Of every model, by its index.
        problems: Takes tensors that some models have and others have not.
    """
    stack = out.architecture.stacks[module]
    depth = sum(part.num_layers for part in parts) if stack is not None else None
    missing = _Missing(problems)
    yield parts[0], list(_outside(module, parts[0], names, out, True, depth, missing))
    number = 0
    for part in parts:
        wanted = []
        for step in range(part.num_layers):
            t = step / (part.num_layers - 1) if part.num_layers > 1 else 1.0
            tables = [names[source.index].layer(module, source.first_layer + step) for source in part.sources]
            lead = tables[part.base or 0]
            labels = [names[source.index].model.label for source in part.sources]
            for part_name in {**lead, **{key: None for table in tables for key in table}}:
                stored = tuple(table.get(part_name) for table in tables)
                place = Place(module, number, part_name)
                name = out.architecture.name_of(place)
                if None in stored:
                    missing.add(name, labels, stored)
                    continue
                wanted.append(Wanted(name, place, stored, t, number, depth))
            number += 1
        yield part, wanted
    yield parts[-1], list(_outside(module, parts[-1], names, out, False, depth, missing))
    missing.report()


def _outside(module, part, names, out, is_first, depth, missing):
    """Tensors in no layer, of the part that they come from."""
    labels = [names[source.index].model.label for source in part.sources]
    sources = [names[source.index] for source in part.sources]
    keys = [key for key in names_of_output(out, sources) if _belongs(key, sources, out, module, is_first)]
    for key in keys:
        stored = tuple(source.find(key) for source in sources)
        if None in stored:
            missing.add(key, labels, stored)
            continue
        place = out.architecture.places.get(key) or Place(module, None, key, is_first)
        yield Wanted(key, place, stored, 0.0, None, depth)


def names_of_output(out: Opened, sources: Sequence[Names]) -> list[str]:
    """Tensors outside of the layers that the output has: those of its own that repeat no other, and the sources'."""
    keys = {
        name: None
        for name, place in out.architecture.places.items()
        if place.layer is None and name not in out.computed and name not in out.ties
    }
    return list(keys | {key: None for source in sources for key in source.others})


def _belongs(key, sources, out, module, is_first):
    places = [out.architecture.places.get(key)]
    places += [source.model.architecture.places.get(source.others.get(key)) for source in sources]
    place = next(place for place in places if place is not None)
    return place.module == module and place.is_first == is_first


class _Missing:
    """Tensors that some models lack, said once a model: the first twelve and how many."""

    def __init__(self, problems):
        self._problems, self._found = problems, {}

    def add(self, name, labels, stored):
        have = [label for label, one in zip(labels, stored, strict=True) if one is not None]
        for label, one in zip(labels, stored, strict=True):
            if one is None:
                self._found.setdefault((label, tuple(have)), []).append(name)

    def report(self):
        for (label, have), tensors in self._found.items():
            listed = ", ".join(tensors[:12]) + (f" and {len(tensors) - 12} more" if len(tensors) > 12 else "")
            others = f" that {', '.join(have)} ha{'s' if len(have) == 1 else 've'}" if have else " of the output"
            self._problems.append(f"{label} lacks {len(tensors)} tensor{'s' * (len(tensors) > 1)}{others}: {listed}.")


def make_job(
    recipe: Recipe,
    wanted: Wanted,
    part: Part,
    models: Sequence[Opened],
    options: PartOptions,
    problems: list[str],
    vocabulary: Vocabulary | None = None,
) -> TensorJob | None:
    """The job of one tensor; None where its sources do not fit, which `problems` then says.

    Args:
        vocabulary: Of the output, where its rows are to be matched by token; for tensors with a row a token.
    """
    indices = [source.index for source in part.sources]
    infos = [models[index].tensors[name] for index, name in zip(indices, wanted.names, strict=True)]
    at = options.base if options.base is not None else (part.base or 0)
    shape = tuple(infos[at].shape)
    if vocabulary is not None:
        shape = (vocabulary.num_rows, *shape[1:])
        sources = vocabulary.find_sources(indices, wanted.names)
        shapes = [(vocabulary.num_rows, *info.shape[1:]) for info in infos]
    else:
        sources = list(map(Source, indices, wanted.names))
        shapes = [info.shape for info in infos]
    if any(one != shape for one in shapes):
        found = ", ".join(f"{models[i].label} {list(one.shape)}" for i, one in zip(indices, infos, strict=True))
        problems.append(f"{wanted.name}: {found}")
        return None
    dtypes = [info.dtype for info in infos]
    if not _WHOLE.isdisjoint([dtype.kind for dtype in dtypes]):
        if len(set(dtypes)) > 1:
            found = ", ".join(f"{models[i].label} {dtype}" for i, dtype in zip(indices, dtypes, strict=True))
            problems.append(f"{wanted.name}: {found}; integers are copied, so that all must have the same")
            return None
        return TensorJob(
            wanted.name, shape, None, dtypes[0], "copy", tuple(sources), layer=wanted.layer,
            num_layers=wanted.num_layers,
        )  # fmt: skip
    dtype = None if recipe.dtype is None else DTYPES[recipe.dtype]
    out_dtype = dtype or promote(dtypes)
    if recipe.out_dtype is not None:
        out_dtype = DTYPES[recipe.out_dtype]
    if METHODS[recipe.merge_method].data != "none":
        sources = _with_data(recipe, wanted, part, models, sources, problems)
    values = options.at(wanted.name, [wanted.names[k] for k in options.sources], wanted.t)
    job = TensorJob(
        name=wanted.name,
        shape=shape,
        dtype=dtype,
        out_dtype=out_dtype,
        method=recipe.merge_method,
        sources=tuple(sources[k] for k in options.sources),
        base=None if options.base is None else sources[options.base],
        options=values,
        post=recipe.post,
        layer=wanted.layer,
        num_layers=wanted.num_layers,
    )
    if options.is_base_alone:  # nothing is added to it
        scale = {"scale": (None,)}
        job = replace(job, method="passthrough", sources=(job.base,), base=None, options=scale, post=())
    if job.method == "passthrough" and _is_copy(job, dtypes):
        return replace(job, method="copy", options={})
    return job


def _with_data(recipe, wanted, part, models, sources, problems):
    """The sources with what the method needs beside them, where every model has it for this tensor."""
    needed = METHODS[recipe.merge_method].data
    lacking = [models[one.index].label for one in part.sources if one.data is None]
    if lacking:
        problems.append(f"{recipe.merge_method!r} needs {needed}: name a file as 'data' beside {', '.join(lacking)}")
        return sources
    found = [one.data.get(name) for one, name in zip(part.sources, wanted.names, strict=True)]
    lacking = [models[one.index].label for one, data in zip(part.sources, found, strict=True) if data is None]
    if len(lacking) == len(found):
        return sources
    if lacking:
        problems.append(f"{wanted.name}: no {needed} in the data of {', '.join(lacking)}, and the others have some")
        return sources
    return [replace(source, data=data) for source, data in zip(sources, found, strict=True)]


def promote(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds all: the same where there is one, else float32, or float64 where one is."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return DTYPES["float64"] if DTYPES["float64"] in dtypes else DTYPES["float32"]


def _is_copy(job, dtypes):
    """Whether a passthrough changes no byte."""
    return (
        len(job.sources) == 1
        and job.base is None
        and not job.post
        and job.sources[0].rows is None
        and job.options.get("scale") in ((None,), (1.0,))
        and job.out_dtype == dtypes[0]
        and job.dtype in (None, dtypes[0])
    )


def _first_words(model, out) -> tuple[str, str]:
    """(what to drop, what to put in its place) so that names outside of the layers are those of the output."""
    for module, stack in model.architecture.stacks.items():
        theirs = out.architecture.stacks.get(module)
        if stack is None or theirs is None or stack.prefix == theirs.prefix:
            continue
        if theirs.prefix.endswith(stack.prefix):
            return "", theirs.prefix.removesuffix(stack.prefix)
        if stack.prefix.endswith(theirs.prefix):
            return stack.prefix.removesuffix(theirs.prefix), ""
    return "", ""
