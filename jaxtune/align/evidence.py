"""How far to trust an alignment, read off the weights alone."""

import itertools
import re
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.element import Element
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_same, flatten
from jaxtune.types import Params

# Two checkpoints whose weights differ by less than this share are one model (a bfloat16 copy: 0.002).
SAME_RESIDUAL = 0.01
# Above this many standard deviations of the random elements' cosine, a common start is certain.
RELATED_DEVIATIONS = 8.0
RELATED_COSINE = 0.1
# A search always finds something to agree on: unrelated random towers of width 16 to 128 reach 0.26 by
# permutations and 0.42 by the whole group.
REORDERED_COSINE = 0.5


@dataclass(frozen=True)
class Lineage:
    """What the weights say about the common past of two bases.

    Attributes:
        verdict: "same" (one model, up to rounding and the order of its units), "related" (a common start:
            a newer release, a branch, a reordered copy), or "unrelated" (other seeds: no matching of
            weights has been seen to carry much between such bases; measure before you rely on it).
        is_in_place: Whether the kinship shows without moving anything; then the plain task vector is the
            better one to add.
        reason: The numbers behind the verdict, in words.
    """

    verdict: str
    is_in_place: bool
    reason: str


@dataclass(frozen=True)
class MatchEvidence:
    """Numbers about one element; cosines are over leaves with two axes or more.

    Attributes:
        objective: Inner product of target and moved source, for "identity", "found" and each of the
            "random" elements.
        cosine: The same, divided by the norms.
        agreement: Block of the network -> cosine, for "identity", "found" and the mean of "random".
        residual: `||target - g(source)|| / ||target||`, for "identity" and "found".
        coherence: Share of channels on which consecutive junctions of the stream agree, mean over
            junctions; 1 where one order serves the whole stack, chance is 1 / width.
        lineage: Verdict over the two bases.
    """

    objective: dict[str, Any]
    cosine: dict[str, Any]
    agreement: dict[str, dict[str, float]]
    residual: dict[str, float]
    coherence: float
    lineage: Lineage

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for `report.json`."""
        return asdict(self)


def judge_match(
    key: jax.Array, spec: Spec, target: Params, source: Params, element: Element, *, num_random: int = 8
) -> MatchEvidence:
    """Compares an element with the identity and with random elements of the same group.

    Args:
        key: Draws the random elements.
        spec: Symmetry of both networks.
        target, source: The two bases; paths and shapes must agree.
        element: What an alignment found.
        num_random: Random elements drawn for the null; at least 2.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape.
        SpecError: the trees or the element do not fit `spec`.
    """
    check_same({"target": target, "source": source})
    tallies = {"identity": _tally(spec, target, source)}
    tallies["found"] = _tally(spec, target, elements.apply(spec, element, source))
    draws = (elements.random(named_key(key, "random", n), spec) for n in range(num_random))  # one at a time in memory
    randoms = [_tally(spec, target, elements.apply(spec, draw, source)) for draw in draws]
    cosine = {name: tally.cosine() for name, tally in tallies.items()}
    cosine["random"] = [tally.cosine() for tally in randoms]
    objective = {name: tally.objective() for name, tally in tallies.items()}
    objective["random"] = [tally.objective() for tally in randoms]
    agreement = {
        block: {
            "identity": tallies["identity"].cosine(block),
            "found": tallies["found"].cosine(block),
            "random": float(np.mean([tally.cosine(block) for tally in randoms])),
        }
        for block in tallies["identity"].blocks()
    }
    residual = {name: tally.residual() for name, tally in tallies.items()}
    return MatchEvidence(
        objective=objective,
        cosine=cosine,
        agreement=agreement,
        residual=residual,
        coherence=stream_coherence(spec, element),
        lineage=judge_lineage(cosine, residual),
    )


def judge_lineage(cosine: dict[str, Any], residual: dict[str, float]) -> Lineage:
    """The verdict over two bases, from the numbers of `judge_match`."""
    null = np.asarray(cosine["random"])
    deviations = (cosine["identity"] - null.mean()) / max(null.std(ddof=1), 1e-6)
    numbers = (
        f"cosine {cosine['identity']:.3f} in place, {cosine['found']:.3f} aligned, "
        f"{null.mean():.3f} ± {null.std(ddof=1):.3f} for random elements"
    )
    if min(residual.values()) < SAME_RESIDUAL:
        # Not whether moving leaves less: maps inside heads fit even the rounding of a copy a little.
        return Lineage("same", residual["identity"] < SAME_RESIDUAL, numbers)
    if cosine["identity"] > RELATED_COSINE and deviations > RELATED_DEVIATIONS:
        is_in_place = cosine["identity"] > 0.5 * cosine["found"]
        return Lineage("related", bool(is_in_place), numbers)
    if cosine["found"] > REORDERED_COSINE:
        return Lineage("related", False, numbers)
    return Lineage("unrelated", False, numbers)


def measure_residual(spec: Spec, target: Params, moved: Params) -> float:
    """`||target - moved|| / ||target||` over the matched leaves."""
    return _tally(spec, target, moved).residual()


def stream_coherence(spec: Spec, element: Element) -> float:
    """Share of channels on which consecutive junctions of the stream agree; 1 for one shared order."""
    orders = [np.asarray(element[name]) for name in spec.junctions]
    if len(orders) < 2:
        return 1.0
    return float(np.mean([np.mean(a == b) for a, b in itertools.pairwise(orders)]))


def block_of(path: str) -> str:
    """The part of a network that a leaf belongs to: "block_3/attn", "patch", "vision/block_0/mlp"."""
    words = path.split("/")
    for position, word in enumerate(words[:-1]):
        if re.fullmatch(r"\w*(block|layer|stage)_?\d+\w*", word):
            return "/".join(words[: position + 2]) if position + 2 < len(words) else "/".join(words[:-1])
    return "/".join(words[:-1]) or path


class _Tally:
    """Sums of products and squares by block."""

    def __init__(self):
        self.sums = {}  # block -> [<a, b>, <a, a>, <b, b>, <a - b, a - b>] over leaves with two axes or more
        self.all = np.zeros(4)  # the same over every matched leaf

    def cosine(self, block=None):
        product, ours, theirs, _ = self.sums[block] if block else sum(self.sums.values(), np.zeros(4))
        return float(product / max(np.sqrt(ours * theirs), np.finfo(np.float64).tiny))

    def objective(self):
        return float(self.all[0])

    def residual(self):
        _, ours, _, apart = self.all
        return float(np.sqrt(apart / ours)) if ours else float(apart > 0)

    def blocks(self):
        return list(self.sums)


def _tally(spec, target, moved):
    tally, moved = _Tally(), flatten(moved)
    for path, leaf in flatten(target).items():
        if path in spec.unmatched:
            continue
        a, b = np.asarray(leaf, np.float32).ravel(), np.asarray(moved[path], np.float32).ravel()
        apart = a - b
        row = np.array([np.dot(a, b), np.dot(a, a), np.dot(b, b), np.dot(apart, apart)], np.float64)
        del apart  # before the next leaf is read
        tally.all += row
        if np.ndim(leaf) >= 2:
            block = block_of(path)
            tally.sums[block] = tally.sums.get(block, np.zeros(4)) + row
    return tally
