"""The arithmetic of a merge on the devices of JAX: one compiled program a method and kind of run.

The elements of a run are shared out over all local devices by a named sharding; a run that is shorter than the program
is filled up with zeros. What is known of whole leaves (sums, ranks) is found on the host.
"""

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.merge.random_bits import Stream
from jaxtune.merge.view import Combine, Elements, Rank, weaken
from jaxtune.stream.leaves import Leaf, SteppedLeaf, split
from jaxtune.stream.values import DIRECT, is_finite, narrow_into

RUN = 1 << 22  # elements of one program

jax.tree_util.register_dataclass(Rank, data_fields=["value", "last"], meta_fields=[])
jax.tree_util.register_dataclass(Stream, data_fields=["low", "high"], meta_fields=[])


class DeviceMerge:
    """An `engine.MergeSpan` on devices.

    Args:
        devices: Local ones by default.
        run: Elements of one program; a multiple of the number of devices.
    """

    def __init__(self, devices: Any = None, *, run: int = RUN):
        devices = jax.local_devices() if devices is None else devices
        mesh = jax.make_mesh((len(devices),), ("x",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
        self._along, self._whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
        self.span = self._run = run
        self._num_devices = len(devices)
        self._lock = threading.Lock()  # one program at a time keeps all devices busy

    def __call__(self, leaf: Leaf, combine: Combine, start: int, low: int, high: int, out: np.ndarray) -> bool:
        """Merges a span of a leaf into `out`; tells whether all is finite."""
        with jax.enable_x64(True):
            for first, last in split(leaf, self._run, low, high):
                merged = self._merge(leaf, combine, start, first, last, out.dtype)
                with np.errstate(invalid="ignore", over="ignore"):
                    part = np.asarray(merged).reshape(-1)[: last - first]
                if part.dtype == out.dtype:
                    out[first - low : last - low] = part
                    if not is_finite(part):
                        return False
                elif not narrow_into(leaf.name, part, out[first - low : last - low]):
                    return False
        return True

    def _merge(self, leaf, combine, start, low, high, dtype):
        arrays, programs = _inputs_of(leaf, combine, low, high)
        length = self._length(leaf, high - low)
        padded = [_fill_up(array, length) for array in arrays]
        placed = jax.device_put(padded, self._along if leaf.grain != "leaf" else self._whole)
        numbers = tuple(weaken(one.numbers, leaf) for one in programs)
        wide = str(leaf.dtype)
        direct = dtype if dtype in DIRECT.get(leaf.dtype, ()) or dtype == leaf.dtype else None
        key = tuple((one.function, one.constants) for one in programs)
        with self._lock:
            return _merge_arrays(
                tuple(placed), np.int64(start + low), leaf.streams, numbers,
                key=key, plan=_plan_of(leaf), wide=wide, out=None if direct is None else str(direct),
            )  # fmt: skip

    def _length(self, leaf, size):
        """Elements (rows, of rows) of the program that takes a run."""
        if leaf.grain == "leaf":
            return None
        unit = leaf.row_length if leaf.grain == "row" else 1
        rows = max(1, min(self._run, leaf.size) // unit)
        return -(-max(rows, -(-size // unit)) // self._num_devices) * self._num_devices


def _inputs_of(leaf, combine, low, high):
    """Stored runs of everything that goes in, the leaf's own first; and the programs, first to last."""
    bases, programs = [], [combine]
    while isinstance(leaf, SteppedLeaf):
        bases.append(leaf.base)
        programs.append(leaf.combine)
        leaf = leaf.before
    shape = {"element": (high - low,), "row": (-1, leaf.row_length), "leaf": leaf.shape}[leaf.grain]
    arrays = [reader.read_rounded(low, high).reshape(shape) for reader in (*leaf.readers, *reversed(bases))]
    return arrays, programs[::-1]


def _plan_of(leaf):
    """What decides the program beside shapes: units of the leaf and of its post-steps, models, and base."""
    units = []
    while isinstance(leaf, SteppedLeaf):
        units.append(leaf.unit)
        leaf = leaf.before
    return (leaf.unit, *reversed(units)), leaf.num_models, leaf.has_base, leaf.shape if leaf.grain == "leaf" else None


@functools.partial(jax.jit, static_argnames=("key", "plan", "wide", "out"))
def _merge_arrays(arrays, start, streams, numbers, *, key, plan, wide, out):
    units, num_models, has_base, _ = plan
    arrays = [array.astype(wide) for array in arrays]
    own, bases = arrays[: num_models + has_base], arrays[num_models + has_base :]
    programs = [Combine(of, given, constants) for (of, constants), given in zip(key, numbers, strict=True)]
    base = own[-1] if has_base else None
    shape = arrays[0].shape
    merged = programs[0](Elements(jnp, tuple(own[:num_models]), base, start, streams)).astype(wide)
    for program, unit, step_base in zip(programs[1:], units[1:], bases, strict=True):
        one = tuple(array.reshape(-1) if unit == "element" else array for array in (merged, step_base))
        merged = program(Elements(jnp, one[:1], one[1], start, streams[:1])).astype(wide)
    merged = merged.reshape(shape)
    return merged if out is None else merged.astype(out)


def _fill_up(array, length):
    if length is None or len(array) == length:
        return array
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])
