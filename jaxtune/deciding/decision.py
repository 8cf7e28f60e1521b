"""A decision: an ordinary recipe in the place of one with examples, and what to say about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint import Checkpoint
from jaxtune.compose.scoring import share_of
from jaxtune.deciding.estimated import choose_recipe
from jaxtune.deciding.learned import learn_recipe
from jaxtune.deciding.shares import KEPT
from jaxtune.deciding.task_models import (
    TaskModels,
    open_task_models,
    rank,
    score_candidates,
    score_experts,
    with_teachers,
)
from jaxtune.deciding.verdict import SURE, compare
from jaxtune.evaluate.doubts import doubt_names
from jaxtune.recipes.examples import LEARNED
from jaxtune.recipes.schema import Recipe


@dataclass(frozen=True)
class Decision:
    """What examples decided.

    Attributes:
        recipe: To be merged now; it has no examples.
        asked: The recipe that was given.
        facts: For report.json: what was chosen, by how many examples of what, and the scores of the data-free default
            beside those of the choice.
        notes: For readers of the report and the card.
        inputs: Models that went in.
    """

    recipe: Recipe
    asked: Recipe
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    inputs: tuple[Checkpoint, ...]


def decide(recipe: Recipe, work: Path) -> Decision:
    """Lets the examples of a recipe decide.

    Args:
        recipe: With `data`.
        work: Folder for what the merge is to read: Fishers, Grams, a model that was learned. It must stay until then.

    Raises:
        RecipeError: names line and key of what cannot be: a model without examples, an unknown option, nothing to
            choose.
        JaxtuneError: as the method.
    """
    models = open_task_models(recipe)
    decide_one = learn_recipe if recipe.merge_method in LEARNED else choose_recipe
    made, default, facts = decide_one(models, work)
    chosen_by, held = facts.pop("chosen_by"), with_teachers(models, facts.pop("held"))
    is_negation = facts.pop("is_negation", False)
    experts = score_experts(models, held)
    both = [models.merge(default), models.merge(made)]
    before, after = score_candidates(both, held)
    told = _tell(both, held, experts, is_negation=is_negation)
    names = [""] if models.is_together else [str(entry.model) for entry in recipe.models]
    facts |= {
        "method": recipe.merge_method,
        "examples": {name: len(sample) for name, sample in zip(names, models.samples, strict=True)},
        "splits": {name: recipe.data.sources[name].split for name in names},
        "seed": recipe.data.seed,
        "validation": {
            "examples": [len(sample) for sample in held],
            "which": chosen_by,
            "default": {"recipe": _short(default), "scores": before},
            "chosen": {"scores": after},
            "models": experts,
            "gain": None if told is None else told[0],
            "gain_error": None if told is None else told[1],
        },
    }
    notes = [*facts.pop("notes", ())]
    known = () if experts is None else zip(names, experts, strict=True)
    lacking = [name for name, one in known if one.get("accuracy") == 0]
    if lacking and not is_negation:
        notes.append(
            f"data: {', '.join(lacking)} has none of these examples right itself; its accuracy counts as it is."
        )
    notes += _doubts(models, names)
    notes.append(_note(recipe, default, facts, (before, after), experts, told, is_negation=is_negation))
    return Decision(made, recipe, facts, tuple(notes), models.whole.inputs)


def _tell(both, held, experts, *, is_negation):
    """What `compare` says of the choice beside the default; None where nothing says what is right."""
    if not all("label" in sample.batch or "teacher" in sample.batch for sample in held):
        return None
    weights = [1.0 / len(held)] * len(held)
    if is_negation:  # the first task is to be lost
        weights = [-1.0, 1.0]
    elif experts is not None:
        weights = [
            share_of(weight, one["accuracy"]) if "accuracy" in one else weight
            for weight, one in zip(weights, experts, strict=True)
        ]
    return compare(*both, held, weights)


def _doubts(models: TaskModels, names: Sequence[str]) -> list[str]:
    """Models that have no more of their own task's labels right than by chance, read by the names of its classes."""
    if models.is_together:
        return []
    lines = []
    for name, model, sample in zip(names, models.finetuned, models.samples, strict=True):
        doubt = doubt_names(sample, model.params)
        if doubt:
            lines.append(f"data: {name} has {doubt}; in a recipe {{name: FILE, class_prefix: WORD/}}.")
    return lines


def _note(recipe, default, facts, scores, experts, told, *, is_negation):
    """What was chosen beside what is merged without examples; with a verdict where its judges did nothing else."""
    judged, has = facts["validation"], ["accuracy" in one for one in scores[1]]
    on = f"{sum(judged['examples'])} examples of split {', '.join(dict.fromkeys(facts['splits'].values()))}"
    verdict, warning = judged["which"] == KEPT, ""
    if is_negation:  # the first task is to be lost
        values = [control["accuracy"] - lost["accuracy"] for lost, control in scores]
        what = "accuracy on the control less that on the task to lose"
    elif any(has) or experts is not None:
        values = [rank(one, experts)[0] for one in scores]
        what = "mean accuracy" if any(has) else "mean agreement with the models"
        if any(has) and experts is not None:
            what += " (each as a share of the model's own)"
        if any(has) and not all(has):
            what += " and, where there are no labels, agreement with the models"
    else:  # one source without labels
        values = [float(np.mean([one["entropy"] for one in task])) for task in scores]
        what, verdict = "mean entropy", False
        warning = ". Entropy says how sure a model is and not how right: no verdict without labels"
    better = "as good as"
    if told is not None and not told[2]:
        gain, error, _ = told
        is_seen = abs(gain) > SURE * error
        better = ("better than" if gain > 0 else "WORSE than") if is_seen else "not to be told from"
    if not warning and not verdict:
        warning = ". The same examples did both, so this is no verdict: give more of them, or a share as validation"
    words = f"is {better} {_name(default)}" if verdict else f"beside {_name(default)}"
    return (
        f"data: {recipe.merge_method}{_words(facts.get('options'))} {words} on {on} ({judged['which']}): {what} "
        f"{values[1]:.4f}; without examples {values[0]:.4f}"
        + (f" (the difference is known to ± {told[1]:.3f})" if told is not None and verdict else "")
        + warning
    )


def _short(recipe):
    return {
        key: value for key, value in recipe.plain.items() if key in ("merge_method", "parameters", "preset", "post")
    }


def _name(recipe):
    return recipe.merge_method + (_words(recipe.plain.get("parameters")) or " as it is")


def _words(options):
    values = ", ".join(f"{key} {value}" for key, value in (options or {}).items())
    return f" ({values})" if values else ""
