"""Decisions of a whole file of merges, with the folder that holds what they found until the merges are done."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxtune.checkpoint.resume import digest_of, keep_work
from jaxtune.deciding.decision import Decision, decide
from jaxtune.recipes.chain import references_of
from jaxtune.recipes.references import find_folder
from jaxtune.recipes.schema import Recipe
from jaxtune.report.run import Run
from jaxtune.version import __version__


@contextlib.contextmanager
def decide_all(recipes: Sequence[Recipe], out: str | Path, run: Run) -> Iterator[list[Decision]]:
    """Lets examples decide, one recipe after the other; recipes without examples come through as they are.

    A run that is killed while something is learned goes on from its last state when it is called again.

    Args:
        recipes: In their order.
        out: Beside which the folder of work lies.
        run: Times it.
    """
    key = digest_of({"data": [[recipe.plain, _identity(recipe)] for recipe in recipes], "version": __version__})
    with keep_work(out, key) as work:
        decisions = []
        with run.stage("examples"):
            for n, recipe in enumerate(recipes):
                if recipe.data is None:
                    decisions.append(Decision(recipe, recipe, {}, (), ()))
                    continue
                place = work / str(n)
                place.mkdir(exist_ok=True)
                decisions.append(decide(recipe, place))
        yield decisions


def _identity(recipe):
    """Sizes and times of the files that decide."""
    if recipe.data is None:
        return []
    places = []
    for reference in references_of(recipe):
        for path, revision in ((reference.path, reference.revision), (reference.lora, reference.lora_revision)):
            if path is not None:
                folder = Path(find_folder(path, revision, recipe.node, recipe.folder))
                places += sorted(folder.iterdir()) if folder.is_dir() else [folder]
    for one in recipe.data.sources.values():
        beside = [] if recipe.folder is None else [recipe.folder / one.name]
        places += [place for place in (Path(one.name), *beside) if place.is_file()]
    return [[str(place), place.stat().st_size, place.stat().st_mtime_ns] for place in places if place.exists()]
