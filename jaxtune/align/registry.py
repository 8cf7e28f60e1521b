"""Every alignment method by name; one call for all of them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune.align.activations import match_activations
from jaxtune.align.learned import match_learned, match_sinkhorn, match_straight_through
from jaxtune.align.transfusion import match_transfusion
from jaxtune.align.weights import MatchResult, match_weights
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.sample import Sample
from jaxtune.symmetry.spec import Spec
from jaxtune.types import Params


@dataclass(frozen=True)
class Method:
    """One way to find an element.

    Attributes:
        match: (key, spec, target, source, **options) -> a result with `element` and `is_converged`. Of a method that
            looks at data, `sample` is one of the keywords.
        spec_options: What to ask of a family's symmetry unless told otherwise, so that the spec is the
            method's own; options of the method like the others, but for the caller who makes the spec.
        summary: One line for listings.
        data: What it needs beyond weights: "none", "unlabelled inputs" or "labelled examples".
        reference: Where it comes from.
        is_folded: Whether spec and trees are those of folded weights (`symmetry.canonical`).
    """

    match: Callable[..., Any]
    spec_options: dict[str, str]
    summary: str
    data: str
    reference: str
    is_folded: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default: of the spec, then read off the signature."""
        parameters = inspect.signature(self.match).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        own.pop("sample", None)
        return {**self.spec_options, **own}

    def split(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(options of the spec, options of the search); what a family has anyway is not asked of it."""
        asked = {name: options.get(name, default) for name, default in self.spec_options.items()}
        asked = {name: value for name, value in asked.items() if value != PLAIN_SPEC[name]}
        return asked, {name: value for name, value in options.items() if name not in self.spec_options}


def match_full(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    head_cost: str = "circuit",
    weighting: str = "plain",
    num_restarts: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-3,
) -> MatchResult:
    """`match_weights` as transport method `full` calls it, for folded weights and their spec."""
    return match_weights(
        key,
        spec,
        target,
        source,
        head_cost=head_cost,
        weighting=weighting,
        num_restarts=num_restarts,
        max_sweeps=max_sweeps,
        tolerance=tolerance,
    )


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
    "full": Method(
        match_full,
        {},
        "rotations of the stream and invertible maps inside heads, on folded weights; exact symmetry",
        "none",
        "this project; arXiv:2506.22712",
        is_folded=True,
    ),
    "transfusion": Method(
        match_transfusion,
        {"junctions": "each", "inside": "joint"},
        "heads by singular values, one order of the stream per junction",
        "none",
        "arXiv:2505.22697",
    ),
    "activations": Method(
        match_activations,
        PLAIN_SPEC,
        "orders by the correlation of units, heads by their circuits; exact symmetry",
        "unlabelled inputs",
        "arXiv:1511.07543; arXiv:2403.00986",
    ),
    "activations_full": Method(
        match_activations,
        {},
        "the same by the whole group, on folded weights: rotations of the stream, invertible maps inside heads",
        "unlabelled inputs",
        "arXiv:2403.00986; this project",
        is_folded=True,
    ),
    "straight_through": Method(
        match_straight_through,
        PLAIN_SPEC,
        "orders learned through the assignment, so that the line between the models predicts as its ends; exact",
        "unlabelled inputs",
        "arXiv:2209.04836",
    ),
    "sinkhorn": Method(
        match_sinkhorn,
        PLAIN_SPEC,
        "the same through Sinkhorn's iteration, hard at the end; exact symmetry",
        "unlabelled inputs",
        "arXiv:2212.12042",
    ),
    "learned": Method(
        match_learned,
        {},
        "rotations and maps inside heads learned from where activations lead, on folded weights; exact symmetry",
        "unlabelled inputs",
        "arXiv:2506.22712",
        is_folded=True,
    ),
}


def find_element(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    method: str = "weights",
    sample: Sample | None = None,
    **options: Any,
) -> Any:
    """Runs the named method; its result has at least `element` and `is_converged`.

    Of a method that `is_folded` the spec and the trees are those of folded weights.

    Args:
        key: Random choices of the method.
        spec, target, source: As `match_weights`.
        method: A key of `METHODS`.
        sample: Examples for a method that needs some, with labels where it needs labels; the others do not see it.
        **options: The method's own.

    Raises:
        UnknownNameError: no such method, or no such option of it; lists the known ones.
        ConfigError: the method needs examples that are not there.
        JaxtuneError: as the method.
    """
    if method not in METHODS:
        raise unknown_name("align method", method, METHODS)
    known = METHODS[method].options.keys() - METHODS[method].spec_options.keys()
    for option in options:
        if option not in known:
            raise unknown_name(f"option of align method {method!r}", option, known)
    needed = METHODS[method].data
    if needed != "none":
        if sample is None or (needed == "labelled examples" and not sample.is_labelled):
            raise ConfigError(f"align method {method!r} needs {needed}: pass sample= (on the command line --data).")
        options["sample"] = sample
    return METHODS[method].match(key, spec, target, source, **options)
