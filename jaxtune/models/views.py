"""Which entries of a parameter an array holds, followed through reshapes and transposes without looking at values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# What one axis of an array runs over: (axis of the leaf, size, stride within that axis), most significant first.
Factor = tuple[int, int, int]

SAME = frozenset({"convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint"})


@dataclass(frozen=True)
class View:
    """An array that holds every entry of a leaf once, in some order.

    Attributes:
        path: Of the leaf.
        shape: Of the leaf.
        axes: What each axis of the array runs over; nothing for an axis of size 1.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[tuple[Factor, ...], ...]

    @property
    def num_long_axes(self) -> int:
        """Axes of the leaf with more than one entry."""
        return sum(size > 1 for size in self.shape)


def view_of_leaf(path: str, shape: Sequence[int]) -> View:
    """The leaf itself."""
    axes = tuple(((axis, size, 1),) if size > 1 else () for axis, size in enumerate(shape))
    return View(path, tuple(shape), axes)


def follow(view: View, primitive: str, params: dict) -> View | None:
    """What the result of a primitive shows of the leaf, given a view as its operand; None where it is no view."""
    axes = view.axes
    match primitive:
        case name if name in SAME:
            moved = axes
        case "transpose":
            moved = tuple(axes[axis] for axis in params["permutation"])
        case "squeeze":
            gone = {axis % len(axes) for axis in params["dimensions"]}
            moved = tuple(factors for axis, factors in enumerate(axes) if axis not in gone)
        case "expand_dims":
            moved = _broadcast(axes, params)
        case "broadcast_in_dim":
            moved = _broadcast(axes, params)
        case "reshape" if params.get("dimensions") is None:
            moved = _reshape(axes, params["new_sizes"])
        case _:
            moved = None
    return None if moved is None else View(view.path, view.shape, moved)


def leaf_axes(view: View, axes: Sequence[int]) -> tuple[int, ...] | None:
    """The axes of the leaf that some axes of the array run over; None where they run over parts of one."""
    covered: dict[int, int] = {}
    for axis, size, _ in _factors(view, axes):
        covered[axis] = covered.get(axis, 1) * size
    if any(view.shape[axis] != size for axis, size in covered.items()):
        return None
    return tuple(sorted(covered))


def in_order_of_leaf(view: View, axes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes, permutation): axes of the array, split into `sizes` and transposed so, run as the leaf's."""
    factors = _factors(view, axes)
    order = sorted(range(len(factors)), key=lambda i: (factors[i][0], -factors[i][2]))
    return tuple(size for _, size, _ in factors), tuple(order)


def _factors(view, axes):
    return [factor for axis in axes for factor in view.axes[axis]]


def _broadcast(axes, params):
    shape, places = params["shape"], params["broadcast_dimensions"]
    moved = [()] * len(shape)
    for factors, place in zip(axes, places, strict=True):
        moved[place] = factors
    sizes = [math.prod(size for _, size, _ in factors) for factors in moved]
    return tuple(moved) if tuple(sizes) == tuple(shape) else None


def _reshape(axes, sizes):
    """The factors in their order, dealt out to axes of other sizes; a factor may be split."""
    left = [factor for factors in axes for factor in factors]
    moved = []
    for wanted in sizes:
        taken: list[Factor] = []
        while wanted > 1:
            axis, size, stride = left.pop(0)
            if size > wanted:
                if size % wanted:
                    return None
                left.insert(0, (axis, size // wanted, stride))
                size, stride = wanted, stride * (size // wanted)
            elif wanted % size:
                return None
            taken.append((axis, size, stride))
            wanted //= size
        moved.append(tuple(taken))
    return tuple(moved)
