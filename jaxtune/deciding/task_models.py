"""The models of a recipe with examples of their tasks: opened, understood, and merged in memory to be tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint import Checkpoint
from jaxtune.compose.objectives import teach
from jaxtune.compose.registry import METHODS as LEARNED_METHODS
from jaxtune.compose.scoring import mean_score, score_all, score_logits
from jaxtune.compose.vectors import widen
from jaxtune.deciding.shares import Shares, set_apart
from jaxtune.deciding.variants import has_base
from jaxtune.deciding.whole import WholeModels, open_whole
from jaxtune.errors import ConfigError, DataError, UnknownNameError
from jaxtune.evaluate.candidates import stack_candidates
from jaxtune.evaluate.logits import Logits
from jaxtune.evaluate.many import score_many
from jaxtune.loading import check_same_architecture
from jaxtune.opening import open_examples
from jaxtune.recipes.examples import LEARNED, Examples
from jaxtune.recipes.resolve import resolve
from jaxtune.recipes.schema import Recipe
from jaxtune.sample import Sample
from jaxtune.sampling import predicts_tokens
from jaxtune.stream.hold import merge_in_memory
from jaxtune.tree import unflatten
from jaxtune.types import Params

GROUP = 8  # models that are evaluated in one call


@dataclass(frozen=True)
class TaskModels:
    """Models and examples of one recipe.

    Attributes:
        recipe: As it was read.
        whole: Its models.
        samples: One a model; or a single one, for all.
        config: Of their network.
    """

    recipe: Recipe
    whole: WholeModels
    samples: tuple[Sample, ...]
    config: Any

    @property
    def base(self) -> Checkpoint | None:
        """None where the recipe names none."""
        return self.whole.base

    @property
    def finetuned(self) -> tuple[Checkpoint, ...]:
        """In the order of the recipe."""
        return self.whole.finetuned

    @property
    def like(self) -> Checkpoint:
        """The model whose names and layout the result has."""
        return self.base or self.finetuned[0]

    @property
    def is_together(self) -> bool:
        """Whether one sample is for all models."""
        return "" in self.recipe.data.sources

    def groups(self) -> dict[str, str]:
        """Path of each leaf -> the first of the stored tensors that it lies in: leaves of one tensor stay together."""
        return {path: names[0] for path, names in self._stored_names().items()}

    def stored_names(self) -> dict[str, list[str]]:
        """Name of a group -> all stored tensors that its leaves lie in."""
        return {names[0]: names for names in self._stored_names().values()}

    def _stored_names(self):
        codec = self.like.layout.codec
        if codec is None:
            return {name: [name] for name in self.like.layout.tensors}
        return {path: list(row.names) for row in codec.table.rows for path in row.leaves}

    def merge(self, recipe: Recipe) -> Params:
        """The model that a recipe without examples makes, in memory, to the bit; as our tree."""
        tensors = merge_in_memory(self.whole.put_into(resolve(recipe)))
        codec = self.like.layout.codec
        return unflatten(tensors) if codec is None else codec.table.decode(tensors)


def open_task_models(recipe: Recipe) -> TaskModels:
    """Opens what a recipe with examples names.

    Raises:
        RecipeError: a model without examples, a source that cannot be read, an adapter or a transport that does not
            fit: at its line and key.
        ConfigError: models of an unknown family, or of several architectures.
    """
    data = recipe.data
    for entry in recipe.models:
        if entry.transport is not None and not has_base(recipe.merge_method):
            raise entry.transport.node.error(
                f"{recipe.merge_method} has no base that a model could be carried to. Carry it over first, by "
                "'jaxtune transport', and name the result."
            )
    whole = open_whole(recipe)
    names = [str(entry.model) for entry in recipe.models]
    opened = dict(zip(names, whole.finetuned, strict=True))
    if whole.base is not None:
        opened[str(recipe.base_model)] = whole.base
    try:
        config = check_same_architecture(opened)
    except ConfigError as error:
        raise data.node.error(f"examples need models whose network is known here. {error}", at_key=True) from error
    read_by = [one for one in (whole.base, *whole.finetuned) if one is not None]
    if "" in data.sources:
        samples = (_sample(config, data.sources[""], recipe, read_by),)
    else:
        lacking = [name for name in names if name not in data.sources]
        if lacking:
            raise data.node.get("sources").error(
                f"no examples of {', '.join(lacking)}. Name a source for each model, or one source for all."
            )
        samples = tuple(_sample(config, data.sources[name], recipe, read_by) for name in names)
    return TaskModels(recipe, whole, samples, config)


def _sample(config, examples: Examples, recipe: Recipe, models: Sequence[Checkpoint]) -> Sample:
    """Examples of one task, as all its models read them."""
    data, name = recipe.data, examples.name
    learns_labels = recipe.merge_method in LEARNED and LEARNED_METHODS[recipe.merge_method].data == "labelled examples"
    beside = None if recipe.folder is None else recipe.folder / name
    if beside is not None and not Path(name).exists() and beside.exists():
        name = str(beside)
    try:
        return open_examples(
            config, name, models=models, split=examples.split, num_examples=data.samples, seed=data.seed,
            options=examples.options, is_cut_refused=not examples.is_said,
            needs_labels=learns_labels and not predicts_tokens(config),  # whose labels are the texts themselves
        )  # fmt: skip
    except (ConfigError, DataError, UnknownNameError) as error:
        raise examples.node.error(str(error)) from error


def share_out(models: TaskModels, said: float | None = None, **how: Any) -> Shares:
    """`set_apart` of all samples of a recipe.

    Args:
        models: Whose samples.
        said: The share where the recipe's parameters name one; None: that of `data`.
        **how: As `set_apart`.

    Raises:
        RecipeError: no such share, or too few examples for it, at the line and key to be changed.
    """
    recipe, data = models.recipe, models.recipe.data
    share = data.validation if said is None else said
    key, node = "data.validation", data.node.get("validation")
    if said is not None:
        key, node = "parameters.validation", recipe.parameters["validation"].node
    try:
        shares = set_apart(models.samples, share, seed=data.seed, **how)
        for one in shares.given if shares.own else ():
            one.split(shares.own, by_class=False)  # as the method will: the counts are the same whatever the draw
        return shares
    except ConfigError as error:
        raise (node or data.node).error(str(error)) from error
    except DataError as error:
        enough = int(0.5 / min(share, 1 - share)) + 2  # of which one may be lost by rounding twice
        node = node or data.node.get("samples") or data.node
        few = min(models.samples, key=len)
        raise node.error(
            f"{few.name}: {key} is {share}, which of {len(few)} examples leaves none on one side. {enough} of each "
            "source are enough for it: give more (data.samples), or another share."
        ) from error


def with_teachers(models: TaskModels, samples: Sequence[Sample]) -> list[Sample]:
    """Samples with what each task's own model says of them; of one sample for all, as they are."""
    if models.is_together:
        return list(samples)
    pairs = zip(samples, models.finetuned, strict=True)
    return [teach(sample, widen(model.params)) for sample, model in pairs]


def score_candidates(models: Sequence[Params], samples: Sequence[Sample]) -> list[list[dict[str, float]]]:
    """Scores of every model on every task, a few models in one program."""
    found: list[list[dict[str, float]]] = []
    for start in range(0, len(models), GROUP):
        some = [widen(model) for model in models[start : start + GROUP]]
        count = len(some)
        some += some[-1:] * (min(GROUP, len(models)) - count)  # one size, one program
        candidates = stack_candidates(some)
        each = [score_many(candidates, Logits(sample.forward), sample)["logits"] for sample in samples]
        found += [
            [score_logits(logits[n], sample.batch) for logits, sample in zip(each, samples, strict=True)]
            for n in range(count)
        ]
    return found


def rank(scores: Sequence[Mapping[str, float]], experts: Sequence[Mapping[str, float]] | None) -> tuple[float, float]:
    """What candidates are chosen by: mean accuracy beside each expert's (agreement without labels), then mean loss.

    Of scores without accuracy and without agreement nothing says which is better; they are not ranked.
    """
    first = mean_score(scores, experts)
    names = ["loss" if "loss" in one else "divergence" for one in scores]
    return first, -float(np.mean([one[name] for one, name in zip(scores, names, strict=True)]))


def score_experts(models: TaskModels, samples: Sequence[Sample]) -> list[dict[str, float]] | None:
    """Scores of each task's own model; None of one sample for all."""
    return None if models.is_together else score_all([widen(one.params) for one in models.finetuned], samples)
