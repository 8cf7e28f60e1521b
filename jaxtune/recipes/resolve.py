"""From a recipe and the headers of its models to the jobs of a merge; all that is wrong is said at once."""

import contextlib
import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxtune.recipes import chat
from jaxtune.recipes.compare import compare_configs, compare_dtypes, compare_tokens
from jaxtune.recipes.jobs import MergeJobs, Planned, Source, TensorJob
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.opening import Opened
from jaxtune.recipes.options import PartOptions, check_names
from jaxtune.recipes.output import choose_files, make_config
from jaxtune.recipes.parts import find_parts, open_models
from jaxtune.recipes.schema import Recipe
from jaxtune.recipes.steps import check_steps
from jaxtune.recipes.tensors import Names, make_job, walk_module
from jaxtune.recipes.tokenizers import plan_vocabulary

MAX_PROBLEMS = 24  # shown; the rest is counted


def resolve(recipe: Recipe, *, made: Mapping[str, Path | Planned] | None = None) -> MergeJobs:
    """Resolves a recipe.

    Args:
        recipe: From `read_recipe`.
        made: Name of an earlier merge of the same file -> the folder that it became, or `plan_result` of it.

    Returns:
        The jobs of every tensor of the output, in the order in which the base stores them, and its config and files.

    Raises:
        RecipeError: what cannot be merged, all of it at once: models that are not there, shapes, vocabularies, tensors
            that some lack, numbers of layers and of models, missing parameters.
        CheckpointError: a tokenizer file is damaged.
    """
    with _without_collector():
        return _resolve(recipe, made)


def _resolve(recipe, made) -> MergeJobs:
    notes = check_names(recipe, _levels(recipe))
    recipe = check_steps(recipe)
    models = open_models(recipe, made)
    out_index = 0  # the base is opened first; without one the first model of the text is
    out = models.opened[out_index]
    problems: list[str] = []
    parts = find_parts(recipe, models, out, problems)
    involved = list(dict.fromkeys(source.index for each in parts.values() for part in each for source in part.sources))
    goes_in = [models.opened[index] for index in involved]
    others = [model for model in goes_in if model is not out]
    found, more = compare_configs(out, others)
    problems += found
    notes += [*more, *compare_dtypes(out, others)]
    template, note = chat.choose_template(recipe, goes_in)
    notes += [note] if note else []
    vocabulary = None
    if recipe.tokenizer is None:
        notes += compare_tokens(out, others)
    else:
        index_of = models.plain_index()
        vocabulary = plan_vocabulary(recipe.tokenizer, models.opened, index_of, out_index, involved, problems)
        notes += vocabulary.notes if vocabulary else ()
    jobs = _make_jobs(recipe, models.opened, parts, out, vocabulary, problems, notes)
    if problems:
        raise _refuse(recipe, problems)
    jobs = _repeat_tied(jobs, out)
    config = make_config(recipe, models.opened, parts, out, vocabulary, jobs, notes)
    return MergeJobs(
        models=tuple(model.model for model in models.opened),
        jobs=tuple(jobs),
        config=config,
        side_files=choose_files(models.opened, out, vocabulary, template, notes),
        seed=recipe.seed,
        notes=tuple(dict.fromkeys(notes)),
        recipe=recipe.plain,
    )


def plan_result(jobs: MergeJobs, path: str | Path) -> Planned:
    """What a merge will have made, as a model that a later merge of the same file can be planned from."""
    tensors = {job.name: SimpleNamespace(dtype=job.out_dtype, shape=job.shape) for job in jobs.jobs}
    return Planned(Path(path), jobs.config, SimpleNamespace(tensors=tensors), jobs.side_files)


@contextlib.contextmanager
def _without_collector():
    """Half a million small records that all stay: walking them again and again took half the time of a plan."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _make_jobs(recipe, models, parts, out, vocabulary, problems, notes) -> list[TensorJob]:
    """Jobs of all tensors; what does not fit goes to `problems`."""
    names = [Names(model, out) for model in models]
    axes = [model.rows for model in models]

    def has_row_a_token(index, name):
        return name in axes[index]

    jobs: list[TensorJob] = []
    shapes: list[str] = []
    vocabularies: dict[str, None] = {}
    for module, each in parts.items():
        options: dict[int, PartOptions] = {}
        for part, wanted in walk_module(module, each, names, out, problems):
            if id(part) not in options:
                labels = [models[source.index].label for source in part.sources]
                options[id(part)] = PartOptions(recipe, part, labels, problems)
            indices = [source.index for source in part.sources]
            for one in wanted:
                rows = None
                has_rows = one.layer is None and any(map(has_row_a_token, indices, one.names))
                if has_rows:
                    fits = _check_vocabulary(one, part, models, axes, vocabulary, problems, vocabularies)
                    if not fits:
                        continue
                    rows = vocabulary
                job = make_job(recipe, one, part, models, options[id(part)], shapes, rows)
                if job is not None:
                    jobs.append(job)
    if vocabularies:
        problems.append(
            f"vocabularies differ: {'; '.join(vocabularies)}. Nothing is cut: write 'tokenizer_source: base' to keep "
            "the base's tokens, or 'tokenizer_source: union' to keep all."
        )
    if shapes:
        listed = [f"    {line}" for line in shapes[:12]]
        rest = [f"    ... and {len(shapes) - 12} more"] if len(shapes) > 12 else []
        problems.append(f"shapes differ in {len(shapes)} tensors:\n" + "\n".join(listed + rest))
    jobs += _copy_computed(recipe, out, notes)
    if recipe.models is not None:  # as the base stores them
        order = {name: at for at, name in enumerate(out.tensors)}
        jobs.sort(key=lambda job: order.get(job.name, len(order)))
    return jobs


def _check_vocabulary(one, part, models, axes, vocabulary, problems, found) -> bool:
    """Whether a tensor with a row a token can be merged row by row."""
    pairs = [(source.index, name) for source, name in zip(part.sources, one.names, strict=True)]
    if vocabulary is None:
        sizes = {}
        for index, name in pairs:
            shape = models[index].tensors[name].shape
            sizes[models[index].label] = shape[axes[index].get(name, 0)]
        if len(set(sizes.values())) > 1:
            found[", ".join(f"{label} {size} rows" for label, size in sizes.items())] = None
            return False
        return True
    if any(axes[index].get(name) == 1 for index, name in pairs):
        problems.append(
            f"{one.name}: its columns stand for tokens, and tokenizers are matched by rows only. Take models of one "
            "vocabulary, without a tokenizer."
        )
        return False
    lacking = vocabulary.lacking_models([index for index, _ in pairs])
    if lacking:
        labels = ", ".join(models[index].label for index in lacking)
        problems.append(f"{one.name}: tokens take their rows from {labels}, which does not go into this tensor.")
    return not lacking


def _copy_computed(recipe, out, notes) -> list[TensorJob]:
    """Tensors that the network computes itself, where the base's file holds them and layers stay where they are."""
    jobs, left = [], 0
    for name, info in out.tensors.items():
        if name not in out.computed or name in out.ties:
            continue
        if recipe.models is None and out.architecture.places[name].layer is not None:
            left += 1
            continue
        jobs.append(TensorJob(name, tuple(info.shape), None, info.dtype, "copy", (Source(0, name),)))
    if left:
        notes.append(f"{left} tensors that the network computes itself are left out")
    return jobs


def _repeat_tied(jobs, out: Opened) -> list[TensorJob]:
    """Jobs of tensors that the base stores beside the ones they repeat: the same as of those."""
    by_name = {job.name: job for job in jobs}
    more = [
        replace(by_name[original], name=name)
        for name, original in out.ties.items()
        if name in out.tensors and name not in by_name and original in by_name
    ]
    if more:
        order = {name: at for at, name in enumerate(out.tensors)}
        jobs = [*jobs, *more]
        if all(job.name in order for job in jobs):
            jobs.sort(key=lambda job: order[job.name])
    return jobs


def _levels(recipe: Recipe) -> list[tuple[Mapping[str, Any], bool]]:
    """Every level of parameters, and whether it is of one model."""
    levels = [(recipe.parameters, False)]
    for group in [recipe] if recipe.modules is None else recipe.modules.values():
        if group is not recipe:
            levels.append((group.parameters, False))
        levels += [(entry.parameters, True) for entry in group.models or ()]
        for one in group.slices or ():
            levels.append((one.parameters, False))
            levels += [(entry.parameters, True) for entry in one.sources]
    return levels


def _refuse(recipe: Recipe, problems: Sequence[str]) -> RecipeError:
    problems = list(dict.fromkeys(problems))
    if any(problem.startswith("architecture: ") for problem in problems):  # says why tensors are missing
        problems = [problem for problem in problems if " lacks " not in problem]
    if len(problems) == 1:
        words = problems[0]
        has_place = words.startswith(recipe.node.place.split(",")[0])
        return RecipeError(words) if has_place else recipe.node.error(words)
    shown = [f"  - {problem}" for problem in problems[:MAX_PROBLEMS]]
    rest = [f"  ... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    lines = "\n".join(shown + rest)
    return recipe.node.error(f"these models cannot be merged so, for {len(problems)} reasons:\n{lines}")
