"""What is known of a merge method beside its arithmetic; one record a method."""

import inspect
from collections.abc import Callable, Mapping
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

    def unit_of(self, options: Mapping[str, Any]) -> Unit:
        """The unit under these options, all of them, as recipes spell them."""
        return self.unit(options) if callable(self.unit) else self.unit

    def prepare(self, view: Any, options: Mapping[str, Any]) -> Any:
        """Runs the program with options as recipes spell them."""
        names = {p.rstrip("_"): p for p in inspect.signature(self.program).parameters}
        return self.program(view, **{names[name]: value for name, value in options.items()})


REQUIRED = "(required)"
