"""The `data:` block of a recipe: where examples of each model's task are, and what is to be decided by them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.merge.registry import METHODS
from jaxtune.recipes.nodes import Node, did_you_mean

KEYS = ("samples", "seed", "validation", "sources", "search")

# Methods that are learned from examples (`compose.registry`, which loads JAX and is not asked here) and make one model.
LEARNED = (
    "ada_merging",
    "ada_rank",
    "atlas",
    "atlas_few_shot",
    "atlas_negation",
    "atlas_test_time",
    "best_k_soup",
    "greedy_soup",
    "learned_graft",
    "learned_soup",
    "lines",
    "lot",
    "mergetune",
    "regmean_plus",
    "sca_learn",
)
# Methods that choose among finished models, or weigh them: by examples that none of the models was fitted to. So do
# searches for options of merge methods.
CHOOSERS = ("best_k_soup", "greedy_soup", "learned_soup", "lines")
MAX_CANDIDATES = 4096
MAX_SEED = 2**32  # of NumPy's frozen stream


@dataclass(frozen=True)
class Examples:
    """One source of examples.

    Attributes:
        name: As `data.open_source` takes it.
        split: Of it.
        is_said: Whether the recipe names the split; else it is the method's, `default_split`.
        options: The source's own.
        node: Where it stands.
    """

    name: str
    split: str
    is_said: bool
    options: Mapping[str, Any]
    node: Node


@dataclass(frozen=True)
class DataBlock:
    """What examples there are, and what they decide.

    Attributes:
        samples: At most so many a source; None: all.
        seed: Of the draw, of the split and of the method.
        validation: Share that nothing is learned on: it judges, and where something is chosen too, half of it chooses.
        sources: Model, as the recipe names it -> its examples; one for all under "".
        search: Option of the merge method -> values to choose among.
        node: Where it stands.
    """

    samples: int | None
    seed: int
    validation: float
    sources: Mapping[str, Examples]
    search: Mapping[str, tuple[Any, ...]]
    node: Node


def parse_data(node: Node, method: str, models: Sequence[Any] | None) -> DataBlock:
    """The block of a recipe.

    Args:
        method: Of the recipe; one that is learned has nothing to search.
        models: Its entries; None where it has slices or modules.

    Raises:
        RecipeError: names line, key, what was expected and what came.
    """
    node.check_keys(KEYS)
    if models is None:
        raise node.error("examples decide on whole models: write models, and no slices or modules.", at_key=True)
    samples, seed, validation = (node.get(key) for key in ("samples", "seed", "validation"))
    if samples is not None and samples.expect(int, "a number of examples") < 1:
        raise samples.error(f"expected at least 1 example, found {samples.value}.")
    if seed is not None and not 0 <= seed.expect(int, "a whole number") < MAX_SEED:
        raise seed.error(f"expected a seed of at least 0 and below {MAX_SEED}, found {seed.value}.")
    if validation is not None and not 0 <= validation.expect((int, float), "a share") < 1:
        raise validation.error(f"expected a share of at least 0 and below 1, found {validation.value}.")
    if node.get("sources") is None:
        raise node.error("'sources' is missing: {MODEL: EXAMPLES}, for instance {A1: a1.npz}.")
    return DataBlock(
        samples=samples and samples.value,
        seed=seed.value if seed else 0,
        validation=float(validation.value) if validation else 0.25,
        sources=_parse_sources(node.get("sources"), [str(entry.model) for entry in models], default_split(method)),
        search=_parse_search(node.get("search"), method),
        node=node,
    )


def default_split(method: str) -> str:
    """Of sources whose split is not said: "validation" where examples only choose, else "train"."""
    only_chooses = method in CHOOSERS or (method in METHODS and METHODS[method].data == "none")
    return "validation" if only_chooses else "train"


def _parse_sources(node, models, split):
    if isinstance(node.value, str) or (isinstance(node.value, dict) and "name" in node.value):
        return {"": _parse_examples(node, split)}
    sources = {}
    for key, one in node.items("examples by model, or one source for all"):
        if key not in models:
            raise one.error(f"no model of this recipe is called {key!r}.{did_you_mean(key, models)}", at_key=True)
        sources[key] = _parse_examples(one, split)
    return sources


def _parse_examples(node, default):
    if isinstance(node.value, str):
        return Examples(node.value, default, False, {}, node)
    values = dict(node.items("a source of examples: PATH, or {name: PATH, split: train}"))
    if "name" not in values:
        raise node.error("'name' is missing: digits, glyphs, or the path of an .npz or .jsonl file.")
    split = values.pop("split", None)
    return Examples(
        values.pop("name").expect(str, "the name of a source"),
        default if split is None else split.expect(str, "train, validation or test"),
        split is not None,
        {key: one.plain for key, one in values.items()},
        node,
    )


def _parse_search(node, method):
    if node is None:
        return {}
    if method not in METHODS:
        raise node.error(f"{method} is learned and has no values to search among: set its options as parameters.")
    known, search, count = METHODS[method].options, {}, 1
    for key, one in node.items("values by option"):
        option = "lambda" if key == "scale" and "scale" not in known and "lambda" in known else key
        if option not in known:
            raise one.error(f"unknown option {key!r} of {method}.{did_you_mean(key, known)}", at_key=True)
        values = one.expect(tuple, "a list of values to choose among")
        if not values or not all(isinstance(item.value, bool | int | float | str) for item in values):
            raise one.error("expected a list of at least one number, text or truth value.")
        search[option] = tuple(item.value for item in values)
        count *= len(values)
    if count > MAX_CANDIDATES:
        raise node.error(f"{count} combinations to try; at most {MAX_CANDIDATES}.")
    return search
