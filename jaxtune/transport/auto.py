"""Chooses a transport from the weights alone: what leaves the least between the bases, chance taken into account."""

import dataclasses

import jax
import numpy as np

from jaxtune.align.evidence import judge_match, measure_residual
from jaxtune.errors import SpecError
from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.kinds import kind_of
from jaxtune.transport.full import prepare_full
from jaxtune.transport.identity import prepare_identity
from jaxtune.transport.permutation import prepare_permutation
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.tree import flatten, is_float, map_leaves
from jaxtune.types import Params


def prepare_auto(key, symmetry: Symmetry, source: Params, finetuned: Params, target: Params) -> Prepared:
    """Plain addition, permutation or the full group, by what each leaves between the bases.

    Between kin that never drifted far, plain addition carries most of a fine-tune and moving anything can only lose;
    between kin that did, and between strangers, the larger group carries more. Both show in the residual
    `||target - g(source)|| / ||target||`, taken on folded weights for all three, so that they compare like with
    like. A continuous group finds something to fit in any difference, so between kin `full` must save more than
    it saves where the difference is noise of the same size, leaf by leaf; so must `permutation` between kin in
    place, where it moves more than orders (decoders, whose heads have maps inside). (Where both are about equal the
    choice hardly matters: see docs/ladder.md.)

    Args:
        key: Draws the random elements that kinship is judged against, and the noise.
        symmetry: Spec of the bases.
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.

    Returns:
        The chosen method's own; `info` has "chosen", the "residuals" of all candidates, the lineage ("because"),
        "saved" and "saved_of_noise" (shares of the residual, where noise was asked) and, where the weights cannot
        be folded, why ("full_refused").

    Raises:
        TreeMismatchError, SpecError, NonFiniteError: as `prepare_permutation`.
    """
    candidates = {
        "identity": prepare_identity(key, symmetry, source, finetuned, target),
        "permutation": prepare_permutation(named_key(key, "permutation"), symmetry, source, finetuned, target),
    }
    permuted = candidates["permutation"]
    lineage = judge_match(named_key(key, "evidence"), permuted.spec, target, source, permuted.element).lineage
    simple = {"identity": source, "permutation": elements.apply(permuted.spec, permuted.element, source)}
    judge, refused = permuted, None
    if permuted.spec.form is not None and lineage.verdict != "same":
        try:
            judge = candidates["full"] = prepare_full(named_key(key, "full"), symmetry, source, finetuned, target)
        except SpecError as error:  # weights that cannot be folded, as behind a gain of exactly zero
            refused = str(error)
    ours = judge.fold(target)
    moved = {name: judge.fold(params) for name, params in simple.items()}
    residuals = {name: measure_residual(judge.spec, ours, params) for name, params in moved.items()}
    chosen = "permutation" if residuals["permutation"] < residuals["identity"] else "identity"
    if chosen == "permutation" and lineage.is_in_place and _has_maps(permuted.spec):
        chosen = "identity" if lineage.verdict == "same" else _choose_simple(key, permuted, symmetry, target, source)
    info = {}
    if "full" in candidates:
        evidence = judge_match(named_key(key, "full evidence"), judge.spec, ours, moved["identity"], judge.element)
        residuals["full"] = evidence.residual["found"]
        if lineage.verdict == "unrelated":
            lineage = evidence.lineage
        saved = 1 - residuals["full"] / residuals[chosen] if residuals[chosen] else 0.0
        if saved > 0 and lineage.verdict == "related":
            by_chance = _saved_of_noise(named_key(key, "noise"), prepare_full, symmetry, target, simple[chosen])
            info = {"saved": saved, "saved_of_noise": by_chance}
            saved -= by_chance
        if saved > 0:
            chosen = "full"
    info |= {"chosen": chosen, "because": dataclasses.asdict(lineage), "residuals": residuals, "full_refused": refused}
    return dataclasses.replace(candidates[chosen], info={**candidates[chosen].info, **info})


def _has_maps(spec) -> bool:
    """Whether some of what `permutation` moves is more than an order: maps inside heads fit any difference a little."""
    return any(kind_of(group).order is None for group in spec.groups.values())


def _choose_simple(key, permuted, symmetry, target, source) -> str:
    """Between kin in place: permutation where it saves more than it would of noise, else plain addition."""
    saved = _saved(permuted, target, source)
    by_chance = _saved_of_noise(named_key(key, "plain noise"), prepare_permutation, symmetry, target, source)
    return "permutation" if saved > by_chance else "identity"


def _saved(found, target, source) -> float:
    """Share of the residual between two bases that an element removes, in the coordinates that it acts on."""
    ours, theirs = found.fold(target), found.fold(source)
    before = measure_residual(found.spec, ours, theirs)
    after = measure_residual(found.spec, ours, elements.apply(found.spec, found.element, theirs))
    return 1 - after / before if before else 0.0


def _saved_of_noise(key, prepare, symmetry, target, source) -> float:
    """Share of the residual that a method's search removes where the bases differ by noise of the same size."""
    leaves = flatten(target)

    def add_noise(path, leaf):
        if not is_float(leaf):
            return leaf
        apart = np.asarray(leaves[path], np.float32) - np.asarray(leaf, np.float32)
        size = np.float32(np.linalg.norm(apart) / max(leaf.size, 1) ** 0.5)
        del apart  # of a large leaf, before as much noise is drawn
        noise = np.asarray(size * np.asarray(jax.random.normal(named_key(key, path), leaf.shape, dtype=np.float32)))
        return np.add(noise, leaf, out=noise, dtype=np.float32, casting="unsafe").astype(leaf.dtype)

    noisy = map_leaves(add_noise, source)
    return _saved(prepare(named_key(key, "search"), symmetry, source, source, noisy), noisy, source)
