"""The rungs: pairs of bases from "the same network" to "nothing in common but the task".

L0 planted      B = g(A), g a random element of the whole group: rotation of the stream, invertible maps in heads
L1 drift        L0, then a share of the training again
L2 release      A trained on, for a share of its training, on all of the data (A itself saw one half)
L3 branch       the same start and the same first share of the steps, then another order of the data
L4 seed         another seed, same half of the data
L5 seed+data    another seed, the other half
L6 width        another width; only asked, since no method without data takes it
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from experiments.rungs.networks import Networks, Schedule
from jaxtune.data import DataSource, take_half
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.symmetry import canonical
from jaxtune.symmetry import element as elements
from jaxtune.types import Params


@dataclass(frozen=True)
class Pair:
    """An old base and a new one.

    Attributes:
        rung: "L0" to "L5", with the share behind it where there is one: "L3 branch 0.1".
        index: Number of the pair within its rung.
        source, target: Names of the two bases among the networks.
        is_equivalent: Whether the two compute the same function.
    """

    rung: str
    index: int
    source: str
    target: str
    is_equivalent: bool = False

    @property
    def name(self) -> str:
        return f"{self.rung.replace(' ', '_')}_{self.index}"


@dataclass(frozen=True)
class Rungs:
    """Which rungs are built; shares are of the pre-training's steps. L4 always is."""

    is_planted: bool
    drift: tuple[float, ...]
    release: tuple[float, ...]
    branch: tuple[float, ...]
    continued_rate: float
    has_other_data: bool


def build_pairs(
    networks: Networks, source: DataSource, schedule: Schedule, rungs: Rungs, *, num_pairs: int, seed: int
) -> Iterator[tuple[Pair, Params, Params]]:
    """Trains the bases of every rung and hands the pairs out, rung by rung.

    Args:
        networks: Where bases are kept.
        source: The pre-training task.
        schedule: Of one base.
        rungs: What to build.
        num_pairs: Per rung; base i is trained from seed + i.
        seed: Of the first base.

    Pairs of a rung share no old base. On L4 the new base of pair i is the old base of pair i + 1, the last one's
    the first: five pairs of five networks, so their errors are not wholly independent.
    """
    halves = [take_half(source, half) for half in (0, 1)]

    def base(index, half=0):
        def start():
            return _init(networks.config, seed + index)

        name = f"base_{index}" if half == 0 else f"base_{index}_other_data"
        return name, networks.train(name, start, halves[half], schedule, seed=seed + index)

    def keep_on(name, start, data, share, order):
        steps = max(1, round(share * schedule.num_steps))
        again = replace(schedule, num_steps=steps, learning_rate=rungs.continued_rate)
        return networks.train(name, start, data, again, seed=seed + 1000 + order)

    def pairs_of(i):
        name, params = base(i)
        if rungs.is_planted:
            planted = networks.get(f"{name}_planted", lambda: _plant(networks.config, params, seed + i))
            yield Pair("L0 planted", i, name, f"{name}_planted", is_equivalent=True), params, planted
        for share in rungs.drift:
            target = f"{name}_drift_{share}"
            drifted = keep_on(target, lambda: planted, halves[0], share, i)
            yield Pair(f"L1 drift {share:g}", i, name, target), params, drifted
        for share in rungs.release:
            target = f"{name}_release_{share}"
            released = keep_on(target, lambda: params, source, share, i)
            yield Pair(f"L2 release {share:g}", i, name, target), params, released
        for share in rungs.branch:
            target, step = f"{name}_branch_{share}", round(share * schedule.num_steps)
            way = {"seed": seed + i, "branch": (step, seed + 2000 + i)}
            branched = networks.train(target, lambda: _init(networks.config, seed + i), halves[0], schedule, **way)
            yield Pair(f"L3 branch {share:g}", i, name, target), params, branched
        other, other_params = base((i + 1) % num_pairs)
        yield Pair("L4 seed", i, name, other), params, other_params
        if rungs.has_other_data:
            other, other_params = base(num_pairs + i, half=1)
            yield Pair("L5 seed+data", i, name, other), params, other_params

    for i in range(num_pairs):
        yield from pairs_of(i)


def _init(config, seed) -> Params:
    return registry.init(named_key(jax.random.key(seed), "init"), config)


def _plant(config: Any, params: Params, seed: int) -> Params:
    """`g(params)` for a random element of the whole group, as a network of the family."""
    spec = registry.symmetry_of(config)
    folded = canonical.canonical_spec(spec)
    element = elements.random(named_key(jax.random.key(seed), "planted"), folded)
    return canonical.realise(spec, elements.apply(folded, element, canonical.fold(spec, params)), params)
