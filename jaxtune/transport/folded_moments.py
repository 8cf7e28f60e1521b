"""Cross-moments of activations in the coordinates of folded weights, laid out as leaves that an element moves."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxtune.moments import Meeting, Pair
from jaxtune.symmetry.folding import Network, Places
from jaxtune.symmetry.form import Form
from jaxtune.symmetry.spec import Axis, Spec
from jaxtune.tree import flatten
from jaxtune.types import Params

# A gain below this, relative to the largest of its norm, says nothing about what was behind it.
LEAST_GAIN = 1e-3
DEAD = 1e-6  # of a unit's deviation, relative to the largest of its side: it correlates with nothing


@dataclass(frozen=True)
class Table:
    """What one side of one matrix says about the groups that own its axes.

    Attributes:
        path: Of the matrix, in the folded tree.
        places: Axes of the leaf that this side runs over: those that it sums over, or the others.
        is_input: Which of the two.
        cross: Moments without means; the source's units lie along the axes of the leaf, the target's along the last.
        deviations: Root mean squares of every unit, of the source and of the target.
        axes: Owners, as a leaf of the spec has them, for all axes of `cross` but the last.

    Shapes:
        cross: float64[*axes, n]; deviations: (float64[n], float64[n]).
    """

    path: str
    places: tuple[int, ...]
    is_input: bool
    cross: np.ndarray
    deviations: tuple[np.ndarray, np.ndarray]
    axes: tuple[Axis | None, ...]

    @property
    def energies(self) -> tuple[float, float]:
        """Variance of all units together, of the source and of the target."""
        tiny = np.finfo(np.float64).tiny
        return tuple(max(float(np.sum(np.square(one))), tiny) for one in self.deviations)

    @property
    def correlations(self) -> np.ndarray:
        """`cross` over the deviations of both; 0 for a unit that does nothing."""
        ours, theirs = (np.where(one > DEAD * one.max(initial=0.0), one, np.inf) for one in self.deviations)
        return self.cross / ours.reshape(*self.cross.shape[:-1], 1) / theirs


def lay_out_moments(
    form: Form, folded_spec: Spec, networks: tuple[Params, Params], meetings: Mapping[str, Meeting]
) -> list[Table]:
    """One table for every side of every matrix with an owner.

    The networks are recorded as they are. What a reader takes in is divided by the norm's gain, what a writer makes is
    multiplied by its branch's gain and loses its mean, where layer norms lose it; offsets are constants, and means are
    off. So entry norms and tied tables, of which no folded network can be made, have evidence too.

    Args:
        form: Where the networks' norms are.
        folded_spec: Symmetry of the folded weights.
        networks: Source and target, not folded.
        meetings: Of the two, `moments.gather_pairs`.
    """
    places, own = Places(form), [Network(flatten(params)) for params in networks]
    tables = []
    for path, meeting in meetings.items():
        is_readout = form.tie is not None and path == form.tie.table
        folded = form.tie.readout if is_readout else path
        if folded not in folded_spec.axes or folded in folded_spec.unmatched:
            continue
        row, shape = folded_spec.axes[folded], own[1].leaves[path].shape
        shape, in_axes = (shape[::-1], (0,)) if is_readout else (shape, meeting.in_axes)
        norm, _ = places.reads.get(folded, (None, None))
        into = [None, None] if norm is None else [_divide(network.gain(norm)) for network in own]
        out = [_writer(places, network, path, shape) for network in own]
        kept = tuple(axis for axis in range(len(shape)) if axis not in in_axes)
        for pair, axes, maps, is_input in ((meeting.inputs, in_axes, into, True), (meeting.outputs, kept, out, False)):
            owners = tuple(row[axis].dualised if is_input and row[axis] else row[axis] for axis in axes)
            lengths = [shape[axis] for axis in axes]
            if any(owners) and np.prod(lengths) == len(pair.cross):
                tables.append(Table(folded, tuple(axes), is_input, *_measure(pair, maps, lengths), owners))
    return tables


def _measure(pair: Pair, maps, lengths):
    """(cross, deviations) of folded activations."""
    pair = pair.centred()
    cross, first, second = pair.cross, pair.first, pair.second
    if maps[0] is not None:
        cross, first, second = (
            _map(maps[0], cross, maps[1]),
            _map(maps[0], first, maps[0]),
            _map(maps[1], second, maps[1]),
        )
    deviations = tuple(np.sqrt(np.maximum(np.diagonal(gram), 0.0)) for gram in (first, second))
    return cross.reshape(*lengths, -1), deviations


def _map(left, table, right):
    return left.T @ table @ right


def _divide(gain):
    floor = LEAST_GAIN * np.abs(gain).max(initial=0.0)
    return np.diag(np.where(np.abs(gain) > floor, 1.0 / np.where(gain == 0, 1.0, gain), 0.0))


def _writer(places, network, path, shape):
    """What stands behind a writer's outputs; None where nothing does."""
    if path not in places.branches and path not in places.centred:
        return None
    size = shape[-1]
    gain = np.eye(size) if path not in places.branches else np.diag(network.vector(places.branches[path]))
    return gain - gain.mean(axis=1, keepdims=True) if path in places.centred else gain
