"""Half fine-tuning: whole matrices drawn at random stay still, and have no state in the optimiser."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.merge.half_reset import LEVELS, is_kept


@dataclass(frozen=True)
class Half:
    """Which leaves of a network are trained, and how that was drawn.

    Attributes:
        level, seed, stage: As `draw_half` took them.
        trained, frozen: Paths of what the family lets gradients move at all.
    """

    level: str
    seed: int
    stage: int
    trained: tuple[str, ...]
    frozen: tuple[str, ...]

    def is_trained(self, path: str) -> bool:
        """For `train.step`: whether the optimiser sees a leaf; what it does not see has no momentum and no decay."""
        return path in self._chosen

    def facts(self) -> dict[str, Any]:
        """For reports, as JSON holds it."""
        return {"level": self.level, "seed": self.seed, "stage": self.stage, "frozen": list(self.frozen)}

    def __post_init__(self):
        object.__setattr__(self, "_chosen", frozenset(self.trained))


def draw_half(
    paths: Iterable[str],
    *,
    seed: int,
    stage: int = 0,
    level: str = "category",
    is_trainable: Callable[[str], bool] = lambda path: True,
) -> Half:
    """Draws the half of a network that one stage of training may move.

    Args:
        paths: Of all leaves.
        seed, stage: Each stage of a longer training (a task, a round) draws anew.
        level: As the merge `half_reset` has it: "category" (two of query, key, value and output in every block, and so
            on), "layer" (one of each two blocks) or "leaf".
        is_trainable: What gradients may move at all.

    Returns:
        With the same seed, and the stage for a model's place, `half_reset` keeps the very leaves that are trained here:
        training and resetting afterwards can be compared.

    Raises:
        UnknownNameError: no such level.
        ConfigError: `stage` below 0; nothing would be trained.

    Reference:
        Hui et al. 2024, arXiv:2404.18466.
    """
    if level not in LEVELS:
        raise unknown_name("level of half fine-tuning", level, LEVELS)
    if stage < 0:
        raise ConfigError(f"stage is {stage}; stages are counted from 0.")
    movable = [path for path in paths if is_trainable(path)]
    trained = tuple(path for path in movable if is_kept(seed, stage, path, level=level))
    if not trained:
        raise ConfigError(
            f"half fine-tuning at level {level!r} with seed {seed} leaves nothing to train; change the seed."
        )
    chosen = set(trained)
    return Half(level, seed, stage, trained, tuple(path for path in movable if path not in chosen))
