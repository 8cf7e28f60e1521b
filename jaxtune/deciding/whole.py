"""The models of a recipe as whole networks in memory: adapters merged in, fine-tunes of another base carried over."""

import dataclasses
from dataclasses import dataclass

from jaxtune.checkpoint import Checkpoint
from jaxtune.loading import load, understand
from jaxtune.recipes.carry import carry, read_made
from jaxtune.recipes.jobs import MergeJobs, Transported
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.parts import Models
from jaxtune.recipes.references import find_folder
from jaxtune.recipes.schema import Entry, Recipe


@dataclass(frozen=True)
class WholeModels:
    """What examples decide on.

    Attributes:
        base: As our tree; None where the recipe names none.
        finetuned: The same of every entry, in the order of the recipe. What an adapter or a transport made is in
            float32, or wider; its layout keeps the stored dtypes.
        carried: Entries with a transport, each once, by stored names and in the order of the recipe.
        inputs: Checkpoints that all this was read from.
    """

    base: Checkpoint | None
    finetuned: tuple[Checkpoint, ...]
    carried: tuple[Checkpoint, ...]
    inputs: tuple[Checkpoint, ...]

    def put_into(self, jobs: MergeJobs) -> MergeJobs:
        """Jobs of a recipe of these very entries, with what is carried over made once for all such recipes."""
        carried = iter(self.carried)
        models = (next(carried) if isinstance(model, Transported) else model for model in jobs.models)
        return dataclasses.replace(jobs, models=tuple(models))


def open_whole(recipe: Recipe) -> WholeModels:
    """Opens the models that a recipe names.

    Raises:
        RecipeError: one that is nowhere or damaged, or an adapter or a transport that does not fit.
        JaxtuneError: as `carry`.
    """
    opener = Models(recipe.folder, None)
    if recipe.base_model is not None:
        opener.open(recipe.base_model, recipe.node)
    whole: dict[int, Checkpoint] = {}
    finetuned, carried = [], []
    for entry in recipe.models:
        if _is_stored(entry):
            finetuned.append(_load(entry.model, recipe))
            continue
        at = opener.open_entry(entry, recipe.base_model)
        if at is None:
            raise RecipeError(opener.errors[-1])
        if at not in whole:
            model = opener.opened[at].model
            if isinstance(model, Transported):
                model = carry(model, seed=recipe.seed)
                carried.append(model)
            whole[at] = understand(read_made(model))
        finetuned.append(whole[at])
    base = None if recipe.base_model is None else _load(recipe.base_model, recipe)
    inputs = {one.path: one for one in (base, *finetuned, *_stored(opener)) if one is not None}
    return WholeModels(base, tuple(finetuned), tuple(carried), tuple(inputs.values()))


def _is_stored(entry: Entry):
    return entry.model.lora is None and entry.transport is None


def _load(reference, recipe):
    return load(find_folder(reference.path, reference.revision, recipe.node, recipe.folder), lazy=False)


def _stored(opener):
    """Checkpoints on disk behind what was opened."""
    for opened in opener.opened:
        model = opened.model
        yield from (model.finetuned, model.base, model.target) if isinstance(model, Transported) else (model,)
