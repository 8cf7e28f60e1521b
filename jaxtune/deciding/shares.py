"""Which examples learn, which choose and which judge: what chose is no judge, where there are enough for both."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtune.errors import ConfigError
from jaxtune.sample import Sample

KEPT, CHOSE, LEARNED = "kept apart", "those that chose", "those learned from"
FEWEST = 4  # examples of a task that choose, and as many that judge; fewer do both, and it is said


@dataclass(frozen=True)
class Shares:
    """Examples of every task, set apart.

    Attributes:
        given: What the method gets.
        own: Share of `given` that it chooses by, and does not learn on; 0: it chooses by all of it, or not at all.
        judges: What it and the data-free default are scored on.
        which: `KEPT` where nothing else was done with the judges; else `CHOSE` or `LEARNED`.
    """

    given: list[Sample]
    own: float
    judges: list[Sample]
    which: str


def set_apart(
    samples: Sequence[Sample], share: float, *, learns: bool, chooses: bool, seed: int, by_class: bool = True
) -> Shares:
    """Judges first, and of the rest those that choose.

    Where something is learned and something chosen, either has half of the share; a method that only chooses does so by
    all the rest. With fewer than `FEWEST` judges of a task there are none.

    Args:
        samples: One a task.
        share: Of each that nothing is learned on; 0 sets nothing apart.
        learns, chooses: What the method does.
        seed: Of the splits.
        by_class: Whether every class gives its share, where labels are known; not for methods that must not see them.

    Raises:
        ConfigError: the share is not at least 0 and below 1.
        DataError: it leaves nothing to learn on, or nothing to judge by.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"the share of examples that is kept apart is {share}; it must be at least 0 and below 1.")
    samples = list(samples)
    if not share:
        return Shares(samples, 0.0, samples, LEARNED if learns else CHOSE)
    fewest = min(map(len, samples))
    judging = share / 2 if learns and chooses else share
    if round(judging * fewest) < FEWEST:
        if not learns:
            return Shares(samples, 0.0, samples, CHOSE)
        if not chooses or not round(share * fewest):
            return Shares(samples, 0.0, samples, LEARNED)
        return Shares(samples, share, [one.split(share, seed=seed, by_class=by_class)[1] for one in samples], CHOSE)
    pairs = [one.split(judging, seed=seed, by_class=by_class) for one in samples]
    given, judges = ([pair[n] for pair in pairs] for n in range(2))
    return Shares(given, judging / (1 - judging) if learns and chooses else 0.0, judges, KEPT)
