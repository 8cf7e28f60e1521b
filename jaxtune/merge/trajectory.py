"""Averages over the checkpoints of one training run."""

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import ConfigError
from jaxtune.merge.affine import combine_linearly
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.view import Combine, View


def merge_ema(view: View, *, decay: float) -> Combine:
    """Exponential moving average over models in the order of training: from the first, `m ← decay m + (1 - decay) θ_k`.

    Reference:
        Polyak and Juditsky 1992; Morales-Brotons et al. 2024, arXiv:2411.18704.
    """
    last = view.num_models - 1
    return combine_linearly([decay**last] + [(1 - decay) * decay ** (last - k) for k in range(1, last + 1)])


def merge_trajectory(view: View, *, last: int | None = None) -> Combine:
    """Plain mean of the `last` models in the order of training; of all of them without it.

    Reference:
        Izmailov et al. 2018, arXiv:1803.05407 (SWA: all); Kaddour 2022, arXiv:2209.14981 (LAWA: the last).
    """
    count = min(view.num_models if last is None else last, view.num_models)
    return combine_linearly([0.0] * (view.num_models - count) + [1.0] * count, total=float(count))


def _check_decay(options: Mapping[str, Any]) -> None:
    check_between(options, "decay", 0.0, 1.0)


def _check_last(options: Mapping[str, Any]) -> None:
    last = options["last"]
    if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
        raise ConfigError(f"option 'last': expected a count of models from 1 on, got {last!r}.")


EMA = Method(
    merge_ema, "exponential moving average of checkpoints", "arXiv:2411.18704", base="none", check=_check_decay
)
TRAJECTORY = Method(
    merge_trajectory, "mean of the last checkpoints", "arXiv:1803.05407", base="none", check=_check_last
)
