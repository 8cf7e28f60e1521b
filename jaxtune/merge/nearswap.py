"""NearSwap: the other model's value where it is near the base's, a small step towards it elsewhere."""

from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

NEAR = 1e-6  # differences below it count as this much, as mergekit has it


def merge_nearswap(view: View, *, t: float) -> Combine:
    """`w θ_1 + (1 - w) θ_0` with `w = t / |θ_1 - θ_0|`, at most 1: every element moves by t at most.

    Reference:
        alchemonaut, QuartetAnemoi-70B-t0.0001; mergekit 0.1.5.
    """
    if isinstance(t, (int, float)) and t >= NEAR:
        return Combine(_clamp, (t,))
    step = view.xp.maximum(t, 0.0)
    return Combine(_step, (view.xp.minimum(step / NEAR, 1.0), step))


def _clamp(elements: Elements, step: float) -> Leaf:
    return elements.xp.clip(elements.models[0], elements.base - step, elements.base + step)


def _step(elements: Elements, slope: float, step: float) -> Leaf:
    return elements.base + elements.xp.clip(elements.deltas[0] * slope, -step, step)


NEARSWAP = Method(
    merge_nearswap,
    "the other model's value where near, a step of t towards it elsewhere",
    "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    num_models=(1, 1),
)
