"""From a recipe to a merged model on disk: planned, made, described and published, or taken up where it was killed."""

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import checkpoint
from jaxtune.checkpoint import output, safetensors
from jaxtune.checkpoint.files import open_regular
from jaxtune.checkpoint.formats import CONFIG_NAME, INDEX_NAME
from jaxtune.checkpoint.manifest import write_manifest
from jaxtune.checkpoint.publish import check_space, explain_full_disk, publish
from jaxtune.checkpoint.resume import digest_of, keep_work, work_folder
from jaxtune.errors import ConfigError
from jaxtune.recipes.chain import references_of
from jaxtune.recipes.jobs import MergeJobs, Transported
from jaxtune.recipes.reading import read_recipes, without_examples
from jaxtune.recipes.references import find_folder
from jaxtune.recipes.resolve import plan_result, resolve
from jaxtune.recipes.schema import Recipe
from jaxtune.recipes.steps import is_balanced
from jaxtune.report.merging import describe_adapter, describe_card, describe_merge, describe_model
from jaxtune.report.run import Run, to_json
from jaxtune.stream.balance import balance_steps
from jaxtune.stream.files import OutputFiles, lay_out
from jaxtune.stream.forks import Counters
from jaxtune.stream.plan import MergePlan, plan_merge
from jaxtune.stream.processes import ALONE, Processes
from jaxtune.stream.run import MergeSpan, run_merge
from jaxtune.tree import unflatten
from jaxtune.version import __version__

CARD_NAME, REPORT_NAME = "README.md", "report.json"
MADE_NAME = "made"  # in a folder of work: merges of the same file that later ones need
OTHER_FORMATS = ("npz", "orbax")
UNDECIDED = "data: examples decide first on what is a default in this plan; that takes time and memory beside it"


@dataclass(frozen=True)
class PlannedMerge:
    """One merge of a recipe's file, planned.

    Attributes:
        recipe, jobs: As read and resolved.
        files: Of tensors.
        plan: What it takes.
        decision: What examples decided before (`deciding.decision.Decision`); None without examples.
    """

    recipe: Recipe
    jobs: MergeJobs
    files: OutputFiles
    plan: MergePlan
    decision: Any = None

    @property
    def like(self) -> Any:
        """The model whose layout the output has: the base, without one the first."""
        return self.jobs.models[0]


def plan_recipe(
    source: str | Path | Mapping[str, Any], *, seed: int | None = None, **limits: Any
) -> list[PlannedMerge]:
    """Plans every merge of a file from headers and configs; no weight is read.

    Args:
        source: As `recipes.reading.read_recipes` takes it. Of a recipe with examples the merge behind the decision is
            planned.
        seed: In the place of the recipe's.
        **limits: `memory_bytes`, `num_workers`: as `plan_merge` takes them.

    Raises:
        RecipeError: what is wrong with the recipe, or its models with each other: all of it at once.
        CheckpointError: a model cannot be read.
        ConfigError: too little memory.
    """
    recipes = read_recipes(source, seed=seed)
    planned = _plan_all([without_examples(recipe) for recipe in recipes], limits)
    return [
        one if recipe.data is None else replace(one, jobs=replace(one.jobs, notes=(*one.jobs.notes, UNDECIDED)))
        for one, recipe in zip(planned, recipes, strict=True)
    ]


def _plan_all(recipes, limits):
    made: dict[str, Any] = {}
    planned = []
    with _without_collecting():
        for recipe in recipes:
            planned.append(_plan(recipe, made, limits))
            for name in filter(None, (recipe.name, recipe.out_path)):
                made[name] = plan_result(planned[-1].jobs, name)
    return planned


@contextlib.contextmanager
def _without_collecting():
    """Without the garbage collector, which looks for cycles among records of tensors, finds none, and looks again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _plan(recipe, made, limits):
    jobs = resolve(recipe, made=made)
    for job in jobs.jobs:
        if job.post and job.base is None and job.method != "copy":
            raise ConfigError(
                f"post-steps count from a base, and this recipe has none: name base_model (for {job.name})."
            )
    files = lay_out({job.name: _Info(job.out_dtype, job.shape) for job in jobs.jobs}, _layout_model(jobs))
    return PlannedMerge(recipe, jobs, files, plan_merge(jobs, files, **limits))


def _layout_model(jobs):
    first = jobs.models[0]
    return first if isinstance(first, checkpoint.Checkpoint) else None


@dataclass(frozen=True)
class _Info:
    dtype: np.dtype
    shape: tuple[int, ...]


def merge_recipe(
    source: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    seed: int | None = None,
    overwrite: bool = False,
    merge_span: MergeSpan | None = None,
    processes: Processes = ALONE,
    run: Run | None = None,
    **limits: Any,
) -> dict[str, Any]:
    """Makes what a recipe says and publishes it at `out`, whole or not at all.

    Killed and called again it keeps the files that were finished, after it has compared them with their checksums, and
    gives the bytes that an uninterrupted run gives.

    Args:
        source: As `recipes.reading.read_recipes` takes it; of several merges the last one is published.
        out: The folder to create.
        seed: In the place of the recipe's.
        overwrite: Whether a former output there may be replaced.
        merge_span: As `run_merge` takes it.
        processes: This one among those that share the work; the first one publishes.
        run: Times the stages.
        **limits: As `plan_recipe` takes them.

    Returns:
        What report.json holds.

    Raises:
        JaxtuneError: as `plan_recipe`, `run_merge` and `publish`.
    """
    run = run or Run("merge")
    how = {"overwrite": overwrite, "merge_span": merge_span, "processes": processes}
    recipes = read_recipes(source, seed=seed)
    if all(recipe.data is None for recipe in recipes):
        return _merge(recipes, out, run, limits, **how)
    if not processes.is_alone:
        raise ConfigError("examples decide in one process: run a recipe with data: without --distributed.")
    from jaxtune.deciding.deciding import decide_all  # with it come our networks, and JAX

    checkpoint.refuse_existing(out, overwrite=overwrite)
    with decide_all(recipes, out, run) as decisions:
        return _merge([one.recipe for one in decisions], out, run, limits, decisions=decisions, **how)


def _merge(recipes, out, run, limits, *, decisions=None, overwrite, merge_span, processes):
    """Ordinary recipes, from their plans to the folder of the last."""
    with run.stage("plan"):
        planned = _plan_all(recipes, limits)
        inputs = [place for one in planned for place in _folders_of(one)]
        checkpoint.refuse_existing(out, overwrite=overwrite, inputs=inputs)
        check_space(out, sum(one.plan.write_bytes for one in planned))
    key = digest_of(_identity(planned))
    with _shared_work(out, key, processes) as work:
        made: dict[str, Path] = {}
        for n, one in enumerate(planned):
            place = Path(os.path.abspath(out)) if n == len(planned) - 1 else work / MADE_NAME / str(n)
            if not place.exists() or n == len(planned) - 1:
                if n:
                    one = _plan(one.recipe, made, limits)
                if decisions is not None and decisions[n].asked.data is not None:
                    one = _with_decision(one, decisions[n])
                how = {"overwrite": overwrite, "merge_span": merge_span, "processes": processes}
                report = _make(one, place, work / f"files-{n}", run, **how)
            for name in filter(None, (one.recipe.name, one.recipe.out_path)):
                made[name] = place
        return report


def _with_decision(planned, decision):
    """A merge that says what was asked for, and what examples decided."""
    jobs = replace(planned.jobs, recipe=decision.asked.plain, notes=(*planned.jobs.notes, *decision.notes))
    return replace(planned, jobs=jobs, decision=decision)


def _make(planned, place, work, run, *, overwrite, merge_span, processes):
    """One merge, from its jobs to its folder."""
    jobs = _carry(planned.jobs, run)
    jobs = _balance(jobs, planned.plan.num_workers, run)
    how = {"num_workers": planned.plan.num_workers, "merge_span": merge_span, "processes": processes}
    written, total = Counters(planned.plan.num_workers), max(planned.files.num_bytes, 1)
    watched = run.stage("merge", lambda: f"{100 * written.total() // total} %")
    with watched, explain_full_disk(place, planned.files.num_bytes):
        merged = run_merge(jobs, planned.files, work, written=written, **how)
    if not processes.is_first:
        processes.wait_for("published")
        return {}
    with run.stage("checksums"):
        decided = planned.decision
        inputs = [describe_model(model) for model in (decided.inputs if decided else _stored_models(planned))]
        inputs += [describe_adapter(folder) for folder in _adapters_of(decided.asked if decided else planned.recipe)]
    report = describe_merge(jobs, planned.plan, merged.crc32, inputs)
    if decided:
        report["data"] = decided.facts
    with run.stage("publish"), publish(place, overwrite=overwrite) as folder:
        _write_weights(planned, merged, folder)
        for name, content in {**jobs.side_files, CARD_NAME: describe_card(place.name, jobs, inputs).encode()}.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                with open_regular(Path(content)) as original, open(target, "xb") as copy:
                    shutil.copyfileobj(original, copy)
        (folder / REPORT_NAME).write_text(to_json(report | {"cost": _cost(run, merged)}))
        parents = {f"model {n}": one for n, one in enumerate(inputs)}
        write_manifest(folder, config=jobs.recipe, parents=parents, seeds={"seed": jobs.seed})
    processes.wait_for("published")
    return report | {"cost": _cost(run, merged)}


def _cost(run, merged):
    """Time and memory; the peak of this process alone says nothing of those that it forked, and counts mapped files."""
    return {"seconds": run.cost()["seconds"], "own_memory_bytes": merged.own_memory_bytes}


def _write_weights(planned, merged, folder):
    like = planned.like
    if getattr(like, "format", "") in OTHER_FORMATS:
        tensors = {}
        for path in merged.paths.values():
            tensors |= safetensors.read_tensors(path)[1]
        config = dict(planned.jobs.config)
        layout = output.make_layout(unflatten(tensors), config, format=like.format)
        output.write_checkpoint(folder, unflatten(tensors), layout)
        return
    for name, path in merged.paths.items():
        output.link_file(path, folder / name)
    if planned.files.index is not None:
        (folder / INDEX_NAME).write_bytes(planned.files.index)
    (folder / CONFIG_NAME).write_bytes(_config_bytes(planned))


def _config_bytes(planned):
    """The base's own bytes where nothing in its config has changed."""
    layout = getattr(planned.like, "layout", None)
    data = getattr(layout, "config", None)
    if data is not None and json.loads(data) == planned.jobs.config:
        return data
    return (json.dumps(planned.jobs.config, indent=2) + "\n").encode()


def _carry(jobs, run):
    """The jobs with every model made: those that were fine-tuned from another base, carried to this one."""
    if not any(isinstance(model, Transported) for model in jobs.models):
        return jobs
    from jaxtune.recipes.carry import carry_models

    with run.stage("transport"):
        return carry_models(jobs)


def _balance(jobs, num_workers, run):
    """The jobs with the strengths of post-steps that are read off the models; notes say them."""
    if not any(is_balanced(name, options) for job in jobs.jobs for name, options in job.post):
        return jobs
    with run.stage("balance"):
        jobs, strengths = balance_steps(jobs, num_workers=num_workers)
    notes = [f"post-step {place}: alpha {alpha:.6g}, balanced" for place, alpha in strengths.items()]
    return replace(jobs, notes=(*jobs.notes, *notes))


@contextlib.contextmanager
def _shared_work(out, key, processes):
    """The folder of work, which the first of several processes holds and clears."""
    if processes.is_first:
        with keep_work(out, key) as work:
            yield work
    else:
        yield work_folder(out, key)


def _identity(planned):
    """Everything that decides the bytes of the result: recipes, versions, and which files the models are."""
    places = [place for one in planned for model in _stored_models(one) for place in _places_of(model)]
    places += [place for one in planned for folder in _adapters_of(one.recipe) for place in sorted(folder.iterdir())]
    files = [_identity_of(place) for place in places]
    return {"recipes": [one.jobs.recipe for one in planned], "files": files, "version": __version__}


def _stored_models(planned):
    """Every checkpoint that a merge reads; of a model that is carried over, itself and both bases."""
    models = {}
    for model in planned.jobs.models:
        parts = (model.finetuned, model.base, model.target) if isinstance(model, Transported) else (model,)
        models |= {one.path: one for one in parts if isinstance(one, checkpoint.Checkpoint)}
    return list(models.values())


def _adapters_of(recipe):
    """Folders of the adapters that a recipe names."""
    adapters = [one for one in references_of(recipe) if one.lora is not None]
    return [find_folder(one.lora, one.lora_revision, recipe.node, recipe.folder) for one in adapters]


def _folders_of(planned):
    return [Path(model.path) for model in _stored_models(planned)] + _adapters_of(planned.recipe)


def _places_of(model):
    root = model.path if model.path.is_dir() else model.path.parent
    return [root / file.name for file in model.layout.files] + sorted(model.side_files.values())


def _identity_of(place):
    try:
        state = place.stat()
    except OSError:
        return [str(place)]
    return [str(place), state.st_size, state.st_mtime_ns]
