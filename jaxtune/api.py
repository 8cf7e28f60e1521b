"""The calls behind `import jaxtune as jt`: everything the command line does, on trees of weights.

A model is a checkpoint, as `jt.load` gives, the path of one, or a bare tree of arrays; with bare trees the
architecture comes from `config` (a model config, or its dict) or from a ready `spec`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import symmetry
from jaxtune.adapters import Adapter, is_adapter, read_adapter
from jaxtune.adapting import open_adapted
from jaxtune.align.evidence import MatchEvidence, judge_match
from jaxtune.align.registry import METHODS as ALIGN_METHODS
from jaxtune.align.registry import find_element
from jaxtune.align.weights import match_weights
from jaxtune.checkpoint import Checkpoint
from jaxtune.combining import interpolate as interpolate
from jaxtune.combining import merge as merge
from jaxtune.composing import compose as compose
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.evaluate.equivalence import Equivalence
from jaxtune.evaluate.exactness import verify_element
from jaxtune.evaluate.example import apply_to_matrix, example_batch
from jaxtune.evaluating import evaluate as evaluate
from jaxtune.lazy import is_lazy, read
from jaxtune.loading import Model, load, network_of, open_models, other_widths, share_vocabulary
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.sampling import for_sizes
from jaxtune.symmetry import Spec, canonical
from jaxtune.transport.expectation import expect_recovery
from jaxtune.transport.prepared import Prepared, Symmetry, apply_transport
from jaxtune.transport.registry import METHODS as TRANSPORT_METHODS
from jaxtune.transport.registry import check_widths, prepare_transport
from jaxtune.tree import check_finite, flatten, map_leaves, unflatten

EXAMPLES = 32  # inputs of the equivalence check
FEW_EXAMPLES = 4  # of networks that are read part by part, whose outputs alone can take gigabytes


@dataclass(frozen=True)
class Alignment:
    """What `align` found.

    Attributes:
        element: Group -> value; `symmetry.apply(spec, element, params)` moves any tree of the source, for method `full`
            any folded one (`symmetry.canonical.fold`).
        spec: The symmetry that the element belongs to; for method `full` that of folded weights.
        params: The source, moved; None where no network of the family can hold it (`full` on a tower with an entry
            norm or with a tied table).
        evidence: The element against the identity and random elements.
        equivalence: Outputs of source and moved source compared; None without a config, or with an entry norm.
        info: What the method measured on its way.
    """

    element: Mapping[str, Any]
    spec: Spec
    params: dict[str, Any] | None
    evidence: MatchEvidence
    equivalence: Equivalence | None
    info: dict[str, Any]


@dataclass(frozen=True)
class Transport:
    """What `transport` made.

    Attributes:
        params: The target with the fine-tune, in the target's dtypes.
        prepared: The moved task vector; `apply_transport(prepared, target, scale)` adds it at any scale.
        evidence: How well the bases match under what moved the task vector; where nothing moved, under
            the best permutation, for comparison. None without a symmetry.
        equivalence: Outputs of the source and of the moved source compared; None where nothing moved, without
            a config, or where no network of the family can hold the moved source (`full` on a tower with an
            entry norm).
        expected: Share of the fine-tuning gain that such a residual let arrive on the ladder of base pairs, (low,
            high) at scale 1, see `transport.expectation`; None without evidence, and of methods that look at data.
    """

    params: dict[str, Any]
    prepared: Prepared
    evidence: MatchEvidence | None
    equivalence: Equivalence | None
    expected: tuple[float, float] | None = None


def align(
    source: Model,
    target: Model,
    *,
    config: Any = None,
    spec: Spec | None = None,
    method: str = "weights",
    sample: Sample | None = None,
    seed: int = 0,
    verify: bool = True,
    **options: Any,
) -> Alignment:
    """Finds the symmetry element that brings `source` closest to `target`.

    Args:
        source: What moves.
        target: What stays; of checkpoints the vocabulary may differ (`transport.vocabulary`).
        config: Architecture of bare trees: a model config or its dict.
        spec: A ready symmetry instead of a config.
        method: A key of `jaxtune.align.registry.METHODS`.
        sample: Examples for the methods that look at data (`jaxtune.sampling.make_sample`).
        seed: Of every random choice.
        verify: Whether to run source and moved source and compare them.
        **options: The method's own; transformers also take `junctions` ("shared" or "each") and `inside`
            ("separate" or "joint"), perceptrons and ResNets `scales` ("fixed" or "free"), which choose the spec.

    Raises:
        ConfigError: the architecture is unknown, or the two differ in it; the method needs a sample.
        InexactElementError: the family declares the element exact and outputs say otherwise.
        JaxtuneError: the trees do not fit, hold NaN, or the method or an option is unknown.
    """
    opened = {"source": source, "target": target}
    opened = {name: load(model) if isinstance(model, str | Path) else model for name, model in opened.items()}
    models, config = open_models(opened, config, roles_with_own_words=("source",))
    whole = models["source"]
    own_config = network_of(opened["source"]) if isinstance(opened["source"], Checkpoint) else config
    models, words = share_vocabulary(opened, models, config)
    source, target = models.values()
    symmetry_of = _symmetry(config, spec)
    if method not in ALIGN_METHODS:
        raise unknown_name("align method", method, ALIGN_METHODS)
    spec_options, options = ALIGN_METHODS[method].split(options)
    spec, fold, realise = symmetry_of(**spec_options), _as_it_is, _as_it_is
    if ALIGN_METHODS[method].is_folded:
        own, spec = spec, canonical.canonical_spec(spec)
        fold = functools.partial(canonical.fold, own)
        realise = functools.partial(canonical.realise, own) if canonical.can_realise(own.form) else None
    key = jax.random.key(seed)
    ours, theirs = fold(target), fold(source)
    found = find_element(named_key(key, "align"), spec, ours, theirs, method=method, sample=sample, **options)
    info = words | {
        name: getattr(found, name)
        for name in ("is_converged", "num_sweeps", "start", "objectives", "reached_inside", "num_steps", "losses")
        if hasattr(found, name)
    }
    return Alignment(
        element=found.element,
        spec=spec,
        params=None if realise is None else realise(symmetry.apply(spec, found.element, fold(whole)), like=whole),
        evidence=judge_match(named_key(key, "evidence"), spec, ours, theirs, found.element),
        equivalence=_prove(key, own_config, spec, found.element, whole, fold, realise) if verify else None,
        info=info,
    )


def transport(
    source: Model,
    finetuned: Model | Adapter,
    target: Model,
    *,
    config: Any = None,
    spec: Spec | None = None,
    method: str = "auto",
    sample: Sample | None = None,
    polish: str = "none",
    keep: Sample | None = None,
    scale: float = 1.0,
    seed: int = 0,
    verify: bool = True,
    **options: Any,
) -> Transport:
    """Carries what fine-tuning added to `source` over to `target`.

    Args:
        source: Old base.
        finetuned: Its fine-tune; a LoRA adapter of PEFT, or the folder of one, too. `adapting.carry_adapter` then
            carries the factors themselves.
        target: New base, of the same architecture; of checkpoints the vocabulary may differ, whose rows are then
            matched by token (`transport.vocabulary`; `prepared.info["vocabulary"]` says how). For the methods `theseus`
            and `bico` it may be wider or narrower; between bare trees the sample is then one of `sampling.for_sizes`.
        config: Architecture of bare trees: a model config or its dict.
        spec: A ready symmetry instead of a config.
        method: A key of `jaxtune.transport.registry.METHODS`.
        sample: Examples for a method or a polish that looks at data, see `sampling.make_sample`.
        polish: "distill" teaches the result, on the inputs of `sample`, to say what `finetuned` says (`polish`).
        keep: Examples on which a polish is to leave the new base's predictions as they are.
        scale: Factor of the moved task vector.
        seed: Of every random choice.
        verify: Whether to gather evidence; False saves an alignment and two forward passes. Between widths there is
            none.
        **options: The method's own.

    Raises:
        ConfigError: the architecture is unknown, or the three differ in it, or in widths that the method cannot carry
            between; a sample or a `keep` that nothing reads.
        InexactElementError: the family declares the element exact and outputs say otherwise.
        JaxtuneError: the trees do not fit, hold NaN, or the method or an option is unknown.
    """
    if method not in TRANSPORT_METHODS:
        raise unknown_name("transport method", method, TRANSPORT_METHODS)
    opened = {"source": source, "finetuned": finetuned, "target": target}
    if isinstance(finetuned, str | Path) and is_adapter(finetuned):
        finetuned = opened["finetuned"] = read_adapter(finetuned)
    opened = {name: load(model) if isinstance(model, str | Path) else model for name, model in opened.items()}
    if isinstance(finetuned, Adapter):
        if not isinstance(opened["source"], Checkpoint):
            raise ConfigError("an adapter needs its base as a checkpoint, whose tensors it names: pass its path.")
        opened["finetuned"] = open_adapted(finetuned, opened["source"])
    others = other_widths(opened)
    check_widths(method, others)
    if sample is not None and TRANSPORT_METHODS[method].data == "none" and polish == "none":
        raise ConfigError(
            f"sample=: method {method!r} does not look at examples. Pass polish='distill', which teaches the result on "
            "them, or a method that does."
        )
    if keep is not None and polish == "none":
        raise ConfigError("keep= goes with a polish: pass polish='distill'.")
    movers = ("source", "finetuned")
    own_widths = movers if TRANSPORT_METHODS[method].widths_may_differ else ()
    models, config = open_models(opened, config, roles_with_own_words=movers, roles_with_own_widths=own_widths)
    if others:
        networks = [network_of(opened["source"]), config]
        sample, keep = (None if one is None else for_sizes(one, *networks) for one in (sample, keep))
    target = models["target"]
    models, words = share_vocabulary(opened, models, config)
    if sample is not None:  # networks that run are whole
        models = {name: map_leaves(lambda _, leaf: read(leaf), tree) for name, tree in models.items()}
        target = map_leaves(lambda _, leaf: read(leaf), target)
    source, finetuned, anchor = models.values()
    needs_symmetry = config is not None or spec is not None
    if not needs_symmetry and method not in ("identity", "orthogonal_shift"):
        raise ConfigError(
            f"transport method {method!r} needs the architecture of bare trees: pass config= (a model config or "
            "its dict) or spec=, or load the models with jaxtune.load."
        )
    symmetry_of = _symmetry(config, spec) if needs_symmetry else lambda: _fixed_spec(target)
    key = jax.random.key(seed)
    prepared = prepare_transport(
        named_key(key, "transport"), symmetry_of, source, finetuned, anchor, method=method, sample=sample, **options
    )
    prepared.info.update(words)
    evidence = equivalence = None
    if verify and needs_symmetry and _are_alike(source, anchor):
        spec, element = prepared.spec, prepared.element
        ours, theirs = prepared.fold(anchor), prepared.fold(source)
        if element is None:
            element = match_weights(named_key(key, "compare"), spec, ours, theirs).element
        else:
            equivalence = _prove(key, config, spec, element, source, prepared.fold, prepared.realise)
        evidence = judge_match(named_key(key, "evidence"), spec, ours, theirs, element)
    params = apply_transport(prepared, target, scale)
    if polish != "none":
        from jaxtune.polish import polish_transport  # with it comes optax

        own = symmetry_of() if needs_symmetry else None
        params, prepared = polish_transport(
            named_key(key, "polish"), prepared, params, finetuned, target, sample, polish=polish, keep=keep, spec=own
        )
    check_finite("the result", params)
    expected = None
    is_by_weights = polish == "none" and TRANSPORT_METHODS[method].data == "none"
    if evidence is not None and is_by_weights:
        expected = expect_recovery(evidence.residual["identity" if prepared.element is None else "found"])
    return Transport(params, prepared, evidence, equivalence, expected)


def _symmetry(config, spec) -> Symmetry:
    if spec is not None:

        def ready(**options):
            if options:
                raise ConfigError(
                    f"this method needs the symmetry with {options}, which a ready spec cannot give; pass config=."
                )
            return spec

        return ready
    if config is None:
        raise ConfigError("pass config= (a model config or its dict) or spec=; bare trees do not say what they are.")
    return functools.partial(registry.symmetry_of, config)


def _are_alike(one, other):
    """Whether two trees have the same shapes."""
    shapes = [{path: tuple(leaf.shape) for path, leaf in flatten(params).items()} for params in (one, other)]
    return shapes[0] == shapes[1]


def _fixed_spec(params):
    return symmetry.make_spec([], {path: (None,) * np.ndim(leaf) for path, leaf in flatten(params).items()})


def _as_it_is(params, like=None):
    del like
    return params


def _prove(key, config, spec, element, source, fold, realise):
    """Source against moved source, where some network can hold the latter; `fold` and `realise` as in `Prepared`."""
    if realise is not None:
        return _equivalence(key, config, spec, element, source, fold, realise)
    if spec.form is not None and spec.form.tie and not spec.form.entries:
        return _equivalence_untied(key, config, spec, element, source)
    return None


def _equivalence_untied(key, config, spec, element, source):
    """The same for folded weights of a tied table, which are those of the network with a readout of its own."""
    if config is None:
        return None
    own = dataclasses.replace(config, tied=False)
    own_spec, leaves, tie = registry.symmetry_of(own), flatten(source), spec.form.tie
    source = unflatten({**leaves, tie.readout: leaves[tie.table].T})
    fold, realise = (functools.partial(call, own_spec) for call in (canonical.fold, canonical.realise))
    return _equivalence(key, own, spec, element, source, fold, realise)


def _equivalence(key, config, spec, element, source, fold, realise):
    """Source against moved source on example inputs; `fold` and `realise` as in `Prepared`."""
    if config is None:
        return None
    num_examples = FEW_EXAMPLES if any(map(is_lazy, flatten(source).values())) else EXAMPLES
    batch = example_batch(named_key(key, "examples"), config, num_examples)

    def move(element, params):
        return realise(symmetry.apply(spec, element, fold(params)), params)

    return verify_element(functools.partial(apply_to_matrix, config), spec, element, move, source, batch)
