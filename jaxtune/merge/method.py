"""What is known of a merge method beside its arithmetic; one record a method."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Unit = Literal["element", "row", "leaf"]


@dataclass(frozen=True)
class Method:
    """One way to make one model of several.

    Attributes:
        program: (view, *, **options) -> Combine. Keyword-only parameters are the options; per-model ones arrive as a
            tuple with a value a model. An option called like a Python keyword ends in "_", which recipes leave out.
        summary: One line for listings.
        reference: Where it comes from.
        unit: What `Elements` hold: any run of elements; whole rows along the input axis; the whole leaf. A function of
            the options where it depends on them; `unit_of` answers for both.
        base: Whether the method works on task vectors and so "needs" a base, "may" have one, or has "none".
        num_models: Least and most models beside the base; None is any number.
        per_model: Options that have a value a model.
        data: What it needs beside weights, as `Elements.extras`: "none", or its name for messages.
        presets: Name of a peer -> options with which its results come out.
        scope_option: The option that, set to "model", makes one view of all leaves; None: always a view a leaf.
        by_rows: Whether a matrix of many more outputs than inputs (`is_long`) is merged row by row, in fixed memory.
        check: (options) -> None. Raises ConfigError, or UnknownNameError, where a value makes no sense.
    """

    program: Callable[..., Any]
    summary: str
    reference: str
    unit: Unit | Callable[[Mapping[str, Any]], Unit] = "element"
    base: Literal["needs", "may", "none"] = "needs"
    num_models: tuple[int, int | None] = (1, None)
    per_model: tuple[str, ...] = ()
    data: str = "none"
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scope_option: str | None = None
    by_rows: bool = False
    check: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Option, as recipes spell it -> default (of per-model ones: for one model); required ones are `REQUIRED`."""
        parameters = inspect.signature(self.program).parameters.values()
        return {
            p.name.rstrip("_"): REQUIRED if p.default is inspect.Parameter.empty else p.default
            for p in parameters
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def unit_of(self, options: Mapping[str, Any], shape: Sequence[int] = (), input_axis: int = -1) -> Unit:
        """The unit under these options, all of them, as recipes spell them; of a leaf of some shape."""
        if self.by_rows and is_long(shape, input_axis):
            return "row"
        return self.unit(options) if callable(self.unit) else self.unit

    def prepare(self, view: Any, options: Mapping[str, Any]) -> Any:
        """Runs the program with options as recipes spell them."""
        names = {p.rstrip("_"): p for p in inspect.signature(self.program).parameters}
        return self.program(view, **{names[name]: value for name, value in options.items()})


def is_long(shape: Sequence[int], input_axis: int = -1) -> bool:
    """Whether a leaf is a large matrix of at least twice as many outputs as inputs, as tables of a row a token are."""
    return len(shape) == 2 and math.prod(shape) > LONG and math.prod(shape) >= 2 * shape[input_axis] ** 2


LONG = 1 << 24  # elements; below it whole matrices fit into any memory
REQUIRED = "(required)"
