"""What every method of this room gives back, and what it asks of the models and samples that it is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.errors import ConfigError, DataError
from jaxtune.sample import Sample
from jaxtune.tree import check_finite, check_same
from jaxtune.types import Params


@dataclass(frozen=True)
class Composition:
    """A model made of several.

    Attributes:
        params: The model, in the dtypes of the base.
        info: Numbers that the method met on its way: its history, what it chose and by which scores.
        coefficients: What was learned, as the method's docstring says; None where it is nothing but the model.
        per_task: Of a result with a part for each task, one whole model a task; None where there is one model.
    """

    params: Params
    info: dict[str, Any]
    coefficients: Any = None
    per_task: tuple[Params, ...] | None = None


def check_models(base: Params, finetuned: Sequence[Params]) -> None:
    """Checks that there are fine-tunes, and that all are trees of the base's shapes, without NaN.

    Raises:
        ConfigError: no fine-tune.
        TreeMismatchError, NonFiniteError: names the model and its leaves.
    """
    if not finetuned:
        raise ConfigError("there is no fine-tuned model to compose.")
    named = {"base": base, **{f"model {n}": params for n, params in enumerate(finetuned)}}
    check_same(named)
    for name, params in named.items():
        check_finite(name, params)


def check_counts(**numbers: int) -> None:
    """Checks numbers of examples, passes and the like.

    Raises:
        ConfigError: one below 1; names it.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} is {number}; it must be at least 1.")


def check_samples(finetuned: Sequence[Params], samples: Sequence[Sample], *, is_labelled: bool = False) -> None:
    """Checks that every model has examples of its own.

    Args:
        is_labelled: Whether the method needs labels.

    Raises:
        ConfigError: another number of samples than of models.
        DataError: a sample is empty, or has no labels; names it.
    """
    if len(samples) != len(finetuned):
        raise ConfigError(f"{len(finetuned)} models and {len(samples)} samples: every model needs one, of its task.")
    for sample in samples:
        if not len(sample):
            raise DataError(f"{sample.name}: there are no examples.")
        if is_labelled and not sample.is_labelled:
            raise DataError(
                f"{sample.name}: the examples have no labels, and this method learns from labels. Give each example "
                "its label, or take a method that needs none."
            )
