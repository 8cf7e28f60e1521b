"""Groups whose units a layer writes and another reads, and what the units do: for merges that join units.

Of a leaf the last axis is what it writes and the others what it reads: dense and convolution kernels lie so, and biases
and norms have one axis. Heads and the units inside them lie otherwise and are not asked about.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.sample import Sample
from jaxtune.symmetry.spec import Spec


def hidden_groups(spec: Spec, names: Sequence[str] | None = None) -> list[str]:
    """Orders of units that belong to one layer each: neither the stream, nor heads, nor what is inside them.

    Args:
        spec: Of the networks, as they are.
        names: Some of them; None: all.

    Raises:
        UnknownNameError: a name that is not one of them.
        ConfigError: there are none.
    """
    known = [
        name
        for name, group in spec.groups.items()
        if group.kind == "permutation" and group.parent is None and group.role in ("hidden", "channel")
    ]
    known = [name for name in known if not spec.children_of(name) and writes_and_reads(spec, name)]
    for name in names or ():
        if name not in known:
            raise unknown_name("group of hidden units", name, known or ["(none)"])
    found = known if names is None else [name for name in known if name in names]
    if not found:
        raise ConfigError("this network declares no groups of hidden units whose order is free.")
    return found


def writes_and_reads(spec: Spec, name: str) -> bool:
    """Whether some leaf writes the group and some leaf reads it."""
    return {is_read(spec, path, axis) for path, axis in spec.leaves_of(name)} == {True, False}


def is_read(spec: Spec, path: str, axis: int) -> bool:
    """Whether a leaf reads what lies along an axis, rather than writing it."""
    return axis != len(spec.axes[path]) - 1


def features_of(spec: Spec, name: str, tables: Mapping[str, tuple], sample: Sample) -> np.ndarray:
    """What the units of a group hand on: float32[M, n]; of a convolution a row for every place in its patches.

    Args:
        spec: Of the network.
        name: A group of `hidden_groups`.
        tables: Of `activations.record_tables`.
        sample: For the message.

    Raises:
        ConfigError: nothing that reads the group was recorded.
    """
    size = spec.groups[name].size
    for path, axis in spec.leaves_of(name):
        if is_read(spec, path, axis) and path in tables and axis in tables[path][2]:
            inputs, _, in_axes = tables[path]
            if axis == in_axes[-1]:
                return inputs.reshape(-1, size) if len(in_axes) > 1 else inputs
    raise ConfigError(f"{sample.name}: nothing that reads {name} was recorded.")
