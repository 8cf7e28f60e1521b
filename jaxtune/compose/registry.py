"""Every way to learn a composition by name, with what it needs; one call for all of them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.compose.ada_merging import ada_merging
from jaxtune.compose.ada_rank import ada_rank
from jaxtune.compose.atlas import atlas, atlas_few_shot, atlas_negation, atlas_test_time
from jaxtune.compose.composition import Composition
from jaxtune.compose.depth_scales import lines
from jaxtune.compose.fisher import fisher_search
from jaxtune.compose.grafting import graft
from jaxtune.compose.learned_soup import learned_soup
from jaxtune.compose.mergetune import mergetune
from jaxtune.compose.regression import lot, regmean, regmean_plus
from jaxtune.compose.sca_learn import sca_learn
from jaxtune.compose.soups import best_k_soup, greedy_soup, uniform_soup
from jaxtune.compose.sy_merge import sy_merge
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.sample import Sample
from jaxtune.types import Params

HIDDEN = ("series", "states")  # where a run keeps its states: of the call, not of the method


@dataclass(frozen=True)
class Method:
    """One way to learn a composition.

    Attributes:
        run: (base, finetuned, samples, *, seed=0, **options) -> Composition; `samples` is a sequence.
        summary: One line for listings.
        data: What it needs beyond weights: "labelled examples" or "unlabelled inputs".
        reference: Where it comes from.
        samples: "a model": one sample for each fine-tuned model, of its task; "together": one for all of them;
            "target and control": two, whatever the number of models; "any": the method says.
    """

    run: Callable[..., Composition]
    summary: str
    data: str
    reference: str
    samples: str = "a model"

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default, read off the signature."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in HIDDEN}


METHODS: dict[str, Method] = {
    "ada_merging": Method(
        ada_merging,
        "one coefficient a task, or a task and leaf, by entropy or by what the experts say",
        "unlabelled inputs",
        "arXiv:2310.02575",
    ),
    "ada_rank": Method(
        ada_rank,
        "which singular components of each task vector stay, by entropy or by what the experts say",
        "unlabelled inputs",
        "arXiv:2503.22178",
    ),
    "sy_merge": Method(
        sy_merge,
        "a trunk for all tasks and a layer for each, taught by the experts; several models that share a trunk",
        "unlabelled inputs",
        "arXiv:2412.19098",
    ),
    "sca_learn": Method(
        sca_learn,
        "every output weighs the sources for itself; uniform and shared forms",
        "labelled examples",
        "arXiv:2310.01217",
        samples="any",
    ),
    "lines": Method(
        lines,
        "scales that grow with depth, their strength chosen by examples",
        "labelled examples",
        "arXiv:2410.17146",
        samples="any",
    ),
    "atlas": Method(
        atlas,
        "one coefficient a task and leaf, or several a matrix, by labels of all tasks",
        "labelled examples",
        "arXiv:2407.02880",
    ),
    "atlas_negation": Method(
        atlas_negation,
        "coefficients that lose one task and keep a control",
        "labelled examples",
        "arXiv:2407.02880",
        samples="target and control",
    ),
    "atlas_few_shot": Method(
        atlas_few_shot,
        "fine-tunes of other tasks, weighted for a new one by few labels",
        "labelled examples",
        "arXiv:2407.02880",
        samples="together",
    ),
    "atlas_test_time": Method(
        atlas_test_time,
        "fine-tunes of other tasks, weighted for a new one by its inputs alone",
        "unlabelled inputs",
        "arXiv:2407.02880",
        samples="together",
    ),
    "uniform_soup": Method(
        uniform_soup,
        "the mean of fine-tunes of one task",
        "labelled examples",
        "arXiv:2203.05482",
        samples="together",
    ),
    "greedy_soup": Method(
        greedy_soup,
        "the best fine-tune of one task, and each next one that makes the mean better",
        "labelled examples",
        "arXiv:2203.05482",
        samples="together",
    ),
    "best_k_soup": Method(
        best_k_soup,
        "the mean of the best fine-tunes of one task, as many as do best",
        "labelled examples",
        "arXiv:2203.05482",
        samples="together",
    ),
    "learned_soup": Method(
        learned_soup,
        "fine-tunes of one task, weighted by gradients for each model or each leaf of it",
        "labelled examples",
        "arXiv:2203.05482",
        samples="together",
    ),
    "fisher": Method(
        fisher_search,
        "average weighted by Fisher information, its coefficients the best of a grid or of draws",
        "labelled examples",
        "arXiv:2111.09832",
    ),
    "learned_graft": Method(
        graft,
        "the few entries of each task vector that carry its skill, found by gradients",
        "labelled examples",
        "arXiv:2302.06600",
    ),
    "regmean": Method(
        regmean,
        "matrices nearest to every model's on what they read, from Grams gathered here",
        "unlabelled inputs",
        "arXiv:2212.09849",
    ),
    "regmean_plus": Method(
        regmean_plus,
        "the same layer by layer, behind layers that are merged already",
        "unlabelled inputs",
        "arXiv:2508.03121",
    ),
    "lot": Method(
        lot,
        "task vectors that drift least in what every matrix makes",
        "unlabelled inputs",
        "arXiv:2505.23859",
    ),
    "mergetune": Method(
        mergetune,
        "a fine-tune trained on, so that the lines to what it was and to the base stay low",
        "labelled examples",
        "arXiv:2601.10497",
    ),
}


def compose(
    method: str, base: Params, finetuned: Sequence[Params], samples: Sequence[Sample] | Sample, **options: Any
) -> Composition:
    """Makes one model of several by what examples say.

    Args:
        method: A key of `METHODS`.
        base: What all were fine-tuned from.
        finetuned: The models.
        samples: Of each model's task, in the order of the models; one for all where the method takes one.
        **options: The method's own.

    Raises:
        UnknownNameError: no such method, or no such option of it; lists the known ones.
        ConfigError: another number of samples than the method takes.
        JaxtuneError: as the method.
    """
    if method not in METHODS:
        raise unknown_name("compose method", method, METHODS)
    known = METHODS[method].options
    for option in options:
        if option not in known and option not in HIDDEN:
            raise unknown_name(f"option of compose method {method!r}", option, known or ["(none)"])
    samples = [samples] if isinstance(samples, Sample) else list(samples)
    if METHODS[method].samples == "together" and len(samples) != 1:
        raise ConfigError(f"compose method {method!r} takes one sample for all models, got {len(samples)}.")
    return METHODS[method].run(base, list(finetuned), samples, **options)
