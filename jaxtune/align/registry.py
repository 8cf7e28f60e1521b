"""Every alignment method by name; one call for all of them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune.align.transfusion import match_transfusion
from jaxtune.align.weights import match_weights
from jaxtune.errors import unknown_name
from jaxtune.symmetry.spec import Spec
from jaxtune.types import Params


@dataclass(frozen=True)
class Method:
    """One way to find an element.

    Attributes:
        match: (key, spec, target, source, **options) -> a result with `element` and `is_converged`.
        spec_options: What to ask of a family's symmetry unless told otherwise, so that the spec is the
            method's own; options of the method like the others, but for the caller who makes the spec.
        summary: One line for listings.
        data: What it needs beyond weights.
        reference: Where it comes from.
    """

    match: Callable[..., Any]
    spec_options: dict[str, str]
    summary: str
    data: str
    reference: str

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default: of the spec, then read off the signature."""
        parameters = inspect.signature(self.match).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return {**self.spec_options, **own}

    def split(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(options of the spec, options of the search); what a family has anyway is not asked of it."""
        asked = {name: options.get(name, default) for name, default in self.spec_options.items()}
        asked = {name: value for name, value in asked.items() if value != PLAIN_SPEC[name]}
        return asked, {name: value for name, value in options.items() if name not in self.spec_options}


# One order of the stream, QK and VO apart, no scales: what every family's symmetry is unless more is asked.
PLAIN_SPEC = {"junctions": "shared", "inside": "separate", "scales": "fixed"}

METHODS: dict[str, Method] = {
    "weights": Method(
        match_weights,
        PLAIN_SPEC,
        "coordinate ascent on the inner product of the weights; exact symmetry",
        "none",
        "arXiv:2209.04836",
    ),
    "transfusion": Method(
        match_transfusion,
        {"junctions": "each", "inside": "joint"},
        "heads by singular values, one order of the stream per junction",
        "none",
        "arXiv:2505.22697",
    ),
}


def find_element(
    key: jax.Array, spec: Spec, target: Params, source: Params, *, method: str = "weights", **options: Any
) -> Any:
    """Runs the named method; its result has at least `element`, `is_converged` and `num_sweeps`.

    Raises:
        UnknownNameError: no such method, or no such option of it; lists the known ones.
        JaxtuneError: as the method.
    """
    if method not in METHODS:
        raise unknown_name("align method", method, METHODS)
    known = METHODS[method].options.keys() - METHODS[method].spec_options.keys()
    for option in options:
        if option not in known:
            raise unknown_name(f"option of align method {method!r}", option, known)
    return METHODS[method].match(key, spec, target, source, **options)
