"""Every transport method by name, with what it needs; one call for all of them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.sample import Sample
from jaxtune.transport.auto import prepare_auto
from jaxtune.transport.bico import prepare_bico
from jaxtune.transport.distill import prepare_distill
from jaxtune.transport.full import prepare_full
from jaxtune.transport.gradfix import prepare_align_then_mask, prepare_gradfix, prepare_gradfix_teacher
from jaxtune.transport.identity import prepare_identity
from jaxtune.transport.learned import prepare_learned
from jaxtune.transport.orthogonal_shift import prepare_orthogonal_shift
from jaxtune.transport.permutation import prepare_permutation
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.transport.theseus import prepare_theseus
from jaxtune.transport.tied import prepare_tied
from jaxtune.transport.transfusion import prepare_transfusion
from jaxtune.types import Params


@dataclass(frozen=True)
class Method:
    """One way to carry a task vector.

    Attributes:
        prepare: (key, symmetry, source, finetuned, target, **options) -> Prepared. Of a method that looks at data,
            `sample` is one of the keywords.
        summary: One line for listings.
        data: What it needs beyond weights: "none", "unlabelled inputs" or "labelled examples".
        reference: Where it comes from.
        widths_may_differ: Whether the target may be wider or narrower than the source.
    """

    prepare: Callable[..., Prepared]
    summary: str
    data: str
    reference: str
    widths_may_differ: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default, read off the signature; the sample is none of them."""
        parameters = inspect.signature(self.prepare).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        own.pop("sample", None)
        return own


METHODS: dict[str, Method] = {
    "auto": Method(
        prepare_auto,
        "identity among kin, else permutation or full; decided from the weights alone",
        "none",
        "this project",
    ),
    "identity": Method(prepare_identity, "add the task vector as it is", "none", "arXiv:2212.04089"),
    "orthogonal_shift": Method(
        prepare_orthogonal_shift,
        "leave out the part along the way from old to new base",
        "none",
        "merge-and-rebase",
    ),
    "permutation": Method(
        prepare_permutation,
        "weight matching by permutations that keep heads whole; exact",
        "none",
        "arXiv:2209.04836",
    ),
    "full": Method(
        prepare_full,
        "rotations of the stream and invertible maps inside heads, on folded weights; exact",
        "none",
        "this project; arXiv:2506.22712",
    ),
    "transfusion": Method(
        prepare_transfusion,
        "heads by singular values, one order of the stream per junction",
        "none",
        "arXiv:2505.22697",
    ),
    "theseus": Method(
        prepare_theseus,
        "a rotation for every side of every matrix, from activations on the same inputs; widths may differ",
        "unlabelled inputs",
        "arXiv:2602.12952",
        widths_may_differ=True,
    ),
    "bico": Method(
        prepare_bico,
        "the same with the outputs' rotations from gradients, with labels or without",
        "unlabelled inputs",
        "arXiv:2605.28444",
        widths_may_differ=True,
    ),
    "tied": Method(
        prepare_tied,
        "the element of full, turned by what activations say is left; no examples give full, many Theseus",
        "unlabelled inputs",
        "this project; arXiv:2602.12952",
    ),
    "gradfix": Method(
        prepare_gradfix,
        "keep the entries that the new base's gradients on the examples point at",
        "labelled examples",
        "arXiv:2510.09658",
    ),
    "gradfix_teacher": Method(
        prepare_gradfix_teacher,
        "the same without labels: the fine-tuned source says what each input is",
        "unlabelled inputs",
        "this project; arXiv:2510.09658",
    ),
    "align_then_mask": Method(
        prepare_align_then_mask,
        "full, then masked by gradients: by labels where there are any, else by the fine-tuned source's word",
        "unlabelled inputs",
        "this project",
    ),
    "distill": Method(
        prepare_distill,
        "the new base, or a transport onto it, learns from the fine-tuned source what to say on the inputs",
        "unlabelled inputs",
        "arXiv:1503.02531; arXiv:2405.17258",
    ),
    "learned": Method(
        prepare_learned,
        "an element learned so that the moved update predicts as the fine-tune does on the inputs; exact",
        "unlabelled inputs",
        "this project; arXiv:2506.22712",
    ),
}


def without_data() -> tuple[str, ...]:
    """Names of the methods that need nothing beyond weights."""
    return tuple(name for name, method in METHODS.items() if method.data == "none")


def check_widths(method: str, others: Mapping[str, Sequence[str]]) -> None:
    """Checks that a method can carry to a target of another width, where it is of one.

    Args:
        method: A key of `METHODS`.
        others: Roles whose networks have other widths than the target -> the widths, a line for each; nothing where all
            agree.

    Raises:
        ConfigError: it cannot; names the methods that can.
    """
    if others and not METHODS[method].widths_may_differ:
        able = ", ".join(name for name, one in METHODS.items() if one.widths_may_differ)
        lines = "\n".join(line for role in others.values() for line in role)
        raise ConfigError(
            f"{' and '.join(others)} and the target differ in width:\n{lines}\nTransport method {method!r} carries "
            f"between networks of one width alone. From unlabelled inputs these carry between widths: {able} (on the "
            "command line --method theseus --data DATA)."
        )


def prepare_transport(
    key: jax.Array,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    method: str = "auto",
    sample: Sample | None = None,
    **options: Any,
) -> Prepared:
    """Prepares the named method; `transport.apply_transport` then adds the result at any scale.

    Args:
        key: Random choices of the method.
        symmetry: Spec of the three networks, as a function of the family's own options.
        source, finetuned, target: Old base, its fine-tune, new base.
        method: A key of `METHODS`.
        sample: Examples for a method that needs some, with labels where it needs labels; the others do not see it.
        **options: The method's own.

    Raises:
        UnknownNameError: no such method, or no such option of it; lists the known ones.
        ConfigError: the method needs examples, or labels of them, that are not there.
        JaxtuneError: as the method.
    """
    if method not in METHODS:
        raise unknown_name("transport method", method, METHODS)
    known = METHODS[method].options
    for option in options:
        if option not in known:
            raise unknown_name(f"option of transport method {method!r}", option, known or ["(none)"])
    needed = METHODS[method].data
    if needed != "none":
        if sample is None:
            raise ConfigError(f"transport method {method!r} needs {needed}: pass sample= (on the command line --data).")
        if needed == "labelled examples" and not sample.is_labelled:
            able = ", ".join(name for name, one in METHODS.items() if one.data == "unlabelled inputs")
            raise ConfigError(
                f"transport method {method!r} needs labelled examples, and {sample.name} has no labels. Give each "
                f"example its label, or take a method that needs none: {able}."
            )
        options["sample"] = sample
    return METHODS[method].prepare(key, symmetry, source, finetuned, target, **options)
