"""The best order of units together with a sign or a positive scale for each.

Given what every pair of units would gain, an order is an assignment. A sign is the sign of the pair's product; a
scale is a root of a quartic, and both are best for each pair alone, so the assignment over the best gains is exact.
"""

from dataclasses import dataclass

import numpy as np

from jaxtune.align.assignment import solve_assignment
from jaxtune.symmetry.monomial import factors_of, order_of

# Scales beyond this blow up whatever a fine-tune did on the other side, like maps of a condition above 1000.
MAX_SCALE = 1e3
NUM_STEPS = 25
# Pairs solved at once: few enough for a processor's cache.
CHUNK = 1 << 15


@dataclass(frozen=True)
class Pairing:
    """What every pair of units contributes to the objective, the other groups held still.

    A target unit i and a source unit j with factor s contribute
    `fixed[i, j] + s plain[i, j] + dual[i, j] / s - s^2 own_plain[j] / 2 - own_dual[j] / (2 s^2)`.

    Attributes:
        plain, dual, fixed: Inner products over the leaves that the factor multiplies, divides, and does not touch.
        own_plain, own_dual: Squared norms of the source's units over the first two.

    Shapes:
        plain, dual, fixed: float64[n, n]. own_plain, own_dual: float64[n].
    """

    plain: np.ndarray
    dual: np.ndarray
    fixed: np.ndarray
    own_plain: np.ndarray
    own_dual: np.ndarray

    def objective(self, element: np.ndarray) -> float:
        """The sum over matched pairs: of an element float[2, n], see `symmetry.monomial`."""
        slots, order = np.arange(len(self.plain)), order_of(element)
        pairs = (self.plain[slots, order], self.dual[slots, order], self.own_plain[order], self.own_dual[order])
        return float(np.sum(self.fixed[slots, order] + _gain(factors_of(element, dual=False), *pairs)))


def solve_signs(pairing: Pairing) -> np.ndarray:
    """The order and the signs that maximise the objective: float64[2, n]; exact."""
    return best_signs(pairing.plain + pairing.dual, pairing.fixed)  # a sign is its own inverse, and changes no norm


def best_signs(signed: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """The same from the products that a sign multiplies and those that it does not touch.

    Shapes:
        signed, fixed: float[n, n]. returns: float64[2, n].
    """
    score = np.abs(signed)
    score += fixed
    order = solve_assignment(score)
    chosen = signed[np.arange(len(order)), order]
    return np.stack([order, np.where(chosen < 0, -1.0, 1.0)])


def score_of_signs(element: np.ndarray, signed: np.ndarray, fixed: np.ndarray) -> float:
    """What `best_signs` maximises, of an element float[2, n]."""
    slots, order = np.arange(len(signed)), order_of(element)
    signs = factors_of(element, dual=False)
    return float(np.sum(fixed[slots, order].astype(np.float64) + signs * signed[slots, order].astype(np.float64)))


def solve_scales(pairing: Pairing) -> np.ndarray:
    """The order and the positive scales that maximise the objective: float64[2, n]."""
    size = len(pairing.plain)
    own = tuple(np.broadcast_to(own, (size, size)) for own in (pairing.own_plain, pairing.own_dual))
    tables = (pairing.plain, pairing.dual, *own)
    scales = np.empty((size, size))
    rows = max(1, CHUNK // size)
    for start in range(0, size, rows):
        part = slice(start, start + rows)
        scales[part] = best_scales(*(table[part] for table in tables))
    order = solve_assignment(pairing.fixed + _gain(scales, *tables))
    return np.stack([order, scales[np.arange(size), order]])


def solve_order(pairing: Pairing, target_scales: np.ndarray, source_scales: np.ndarray) -> np.ndarray:
    """The best order where a pair's scale is known: the source unit's balancing scale over the target unit's."""
    scales = np.clip(source_scales / target_scales[:, None], 1 / MAX_SCALE, MAX_SCALE)
    gains = _gain(scales, pairing.plain, pairing.dual, pairing.own_plain, pairing.own_dual)
    order = solve_assignment(pairing.fixed + gains)
    return np.stack([order, scales[np.arange(len(order)), order]])


def best_scales(plain: np.ndarray, dual: np.ndarray, own_plain: np.ndarray, own_dual: np.ndarray) -> np.ndarray:
    """The positive `s` that maximises `s plain + dual / s - s^2 own_plain / 2 - own_dual / (2 s^2)`.

    Where it is stationary, `own_plain s^4 - plain s^3 + dual s - own_dual = 0`. All positive roots lie between
    `plain / own_plain`, the best scale of the one side, and `own_dual / dual`, that of the other (0 and infinity
    where a product is negative); where there are three, the outer two are maxima. So two searches start from the two
    ends, each a Newton iteration in `log s` that halves its bracket where a step would leave it, and the better one
    counts. Scales stay within a factor of 1000; one that nothing determines is 1.

    Shapes:
        all arguments: float64[...], alike; the last two at least 0. returns: float64[...].
    """
    limit = np.log(MAX_SCALE)
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.stack([np.log(np.maximum(plain, 0) / own_plain), np.log(own_dual / np.maximum(dual, 0))])
    ends = np.clip(np.where(np.isnan(ends), ends[::-1], ends), -limit, limit)
    ends = np.where(np.isnan(ends), 0.0, ends)
    below, above = ends.min(axis=0), ends.max(axis=0)
    found = [_climb(start, below, above, (plain, dual, own_plain, own_dual)) for start in (below, above)]
    first, second = (np.exp(log_scale) for log_scale in found)
    pairs = (plain, dual, own_plain, own_dual)
    return np.where(_gain(first, *pairs) >= _gain(second, *pairs), first, second)


def _climb(log_scale, below, above, pairs):
    """A stationary point between `below`, where the gain rises, and `above`, where it falls."""
    plain, dual, own_plain, own_dual = pairs
    for _ in range(NUM_STEPS):
        scale = np.exp(log_scale)
        up, down = scale * plain - dual / scale, scale**2 * own_plain - own_dual / scale**2
        slope = up - down
        bend = scale * plain + dual / scale - 2 * (scale**2 * own_plain + own_dual / scale**2)
        below, above = np.where(slope > 0, log_scale, below), np.where(slope < 0, log_scale, above)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = log_scale - slope / bend
        inside = (bend < 0) & (step >= below) & (step <= above)
        log_scale = np.where(slope == 0, log_scale, np.where(inside, step, 0.5 * (below + above)))
    return log_scale


def _gain(scale, plain, dual, own_plain, own_dual):
    return scale * plain + dual / scale - 0.5 * (scale**2 * own_plain + own_dual / scale**2)
