"""A decision: an ordinary recipe in the place of one with examples, and what to say about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.checkpoint import Checkpoint
from jaxtune.deciding.estimated import choose_recipe
from jaxtune.deciding.learned import learn_recipe
from jaxtune.deciding.task_models import open_task_models, rank, score_candidates, score_experts, with_teachers
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
    before, after = score_candidates([models.merge(default), models.merge(made)], held)
    names = [""] if models.is_together else [str(entry.model) for entry in recipe.models]
    facts |= {
        "method": recipe.merge_method,
        "examples": {name: len(sample) for name, sample in zip(names, models.samples, strict=True)},
        "seed": recipe.data.seed,
        "validation": {
            "examples": [len(sample) for sample in held],
            "which": chosen_by,
            "default": {"recipe": _short(default), "scores": before},
            "chosen": {"scores": after},
            "models": experts,
        },
    }
    scores = [rank(one, experts)[0] for one in (before, after)]
    what = "mean accuracy" if "accuracy" in after[0] else "mean agreement with the models"
    beside = "" if experts is None or "accuracy" not in after[0] else " (each as a share of the model's own)"
    if is_negation:  # the first task is to be lost
        scores = [control["accuracy"] - lost["accuracy"] for lost, control in (before, after)]
        what, beside = "accuracy on the control less that on the task to lose", ""
    words = "better than" if scores[1] > scores[0] else "as good as" if scores[1] == scores[0] else "WORSE than"
    note = (
        f"data: {recipe.merge_method}{_words(facts.get('options'))} is {words} {_name(default)} on validation examples "
        f"({chosen_by}): {what}{beside} {scores[1]:.4f}; without examples {scores[0]:.4f}"
    )
    inputs = {one.path: one for one in (models.base, *models.finetuned) if one is not None}
    return Decision(made, recipe, facts, (*facts.pop("notes", ()), note), tuple(inputs.values()))


def _short(recipe):
    return {
        key: value for key, value in recipe.plain.items() if key in ("merge_method", "parameters", "preset", "post")
    }


def _name(recipe):
    return recipe.merge_method + (_words(recipe.plain.get("parameters")) or " as it is")


def _words(options):
    values = ", ".join(f"{key} {value}" for key, value in (options or {}).items())
    return f" ({values})" if values else ""
