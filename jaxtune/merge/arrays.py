"""Views of leaves that are in memory, and any method on whole trees of them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.lazy import read
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_options
from jaxtune.merge.random_bits import make_stream
from jaxtune.merge.view import Elements, Rank, View, weaken
from jaxtune.tree import check_same, flatten, is_float, unflatten
from jaxtune.types import Leaf, Params

RUN = 1 << 16  # elements that are summed in one piece: part of what decides the last bit of a sum


class ArrayView(View):
    """Leaves in memory: one, or for a method of scope "model" all of them, one after another.

    Args:
        names: Paths.
        models: For every leaf one array a model.
        bases: For every leaf that of the base, or None.
        unit: As `Method.unit`.
        input_axis: As `View.input_axis`.
        seed: Of random bits.
        extras: For every leaf one array a model of what the method needs beside weights, or None; None: for no leaf.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[Sequence[Leaf]],
        bases: Sequence[Leaf | None],
        *,
        unit: str,
        input_axis: int = 0,
        seed: int = 0,
        extras: Sequence[Sequence[Leaf] | None] | None = None,
    ):
        self.name, self.input_axis, self.unit, self.seed = names[0], input_axis, unit, seed
        self.num_models, self.has_base = len(models[0]), bases[0] is not None
        self.xp = np if all(isinstance(leaf, np.ndarray) for leaf in models[0]) else _jax_numpy()
        self.shape = models[0][0].shape if len(names) == 1 else (sum(math.prod(m[0].shape) for m in models),)
        self._leaves = list(zip(names, models, bases, strict=True))
        self._extras = (None,) * len(names) if extras is None else tuple(extras)
        if extras is not None:
            self.extra_shapes = tuple(None if one is None else one[0].shape for one in extras)

    def reduce(self, function: Callable[..., Leaf], *numbers: Any, **constants: Any) -> Leaf:
        """As `View.reduce`."""
        runs = [run for leaf in range(len(self._leaves)) for run in self.runs(leaf)]
        parts = [function(run, *weaken(numbers, run), **constants) for run in runs]
        if self.xp is not np:
            return functools.reduce(lambda a, b: a + b, parts)
        stacked = np.stack([np.asarray(part, np.float64) for part in parts])
        columns = stacked.reshape(len(parts), -1).T
        return np.array([math.fsum(column) for column in columns]).reshape(stacked.shape[1:])

    def add_up(self, function: Callable[..., Leaf], *numbers: Any, num_rows: int, **constants: Any) -> np.ndarray:
        """As `View.add_up`."""
        length = self.whole(0).models[0].shape[1]
        return sum(function(run, *numbers, **constants) for run in self.runs(0, num_rows * length))

    def rank_from_top(self, function: Callable[..., Leaf], count: Any, *numbers: Any, **constants: Any) -> Any:
        """As `View.rank_from_top`."""
        runs = [self.whole(leaf) for leaf in range(len(self._leaves))]
        values = [function(run, *weaken(numbers, run), **constants).reshape(-1) for run in runs]
        values = self.xp.concatenate(values)
        if isinstance(count, tuple):
            return tuple(rank_values(self.xp, values, one) for one in count)
        return rank_values(self.xp, values, count)

    @property
    def dtype(self) -> Any:
        """Of the arithmetic."""
        return self.whole(0).dtype

    def whole(self, leaf: int) -> Elements:
        """All elements of one leaf as one run."""
        name, models, base = self._leaves[leaf]
        start = sum(math.prod(models[0].shape) for _, models, _ in self._leaves[:leaf])
        arrays = (*models, *(() if base is None else (base,)))
        wide = functools.reduce(np.promote_types, [compute_dtype(array.dtype) for array in arrays])
        arrays = [self._shape(array, wide) for array in arrays]
        streams = tuple(make_stream(self.seed, model, name) for model in range(len(models)))
        extras = self._extras[leaf]
        if extras is not None:
            extras = tuple(self._shape(extra, wide) for extra in extras)
        base = arrays[-1] if base is not None else None
        return Elements(self.xp, tuple(arrays[: len(models)]), base, start, streams, extras)

    def runs(self, leaf: int, length: int | None = None):
        """One leaf in runs of about `length` elements (`RUN`), whole rows; under JAX, and of leaves, in one."""
        whole, length = self.whole(leaf), RUN if length is None else length
        first = whole.models[0]
        if self.xp is not np or self.unit == "leaf" or first.size <= length:
            yield whole
            return
        step = length if self.unit == "element" else max(1, length // first.shape[1])
        for low in range(0, first.shape[0], step):
            take = slice(low, low + step)
            yield Elements(
                np,
                tuple(model[take] for model in whole.models),
                None if whole.base is None else whole.base[take],
                whole.start + low * (1 if self.unit == "element" else first.shape[1]),
                whole.streams,
                None if whole.extras is None else tuple(extra[take] for extra in whole.extras),
            )

    def fold_back(self, leaf: int, merged: Leaf) -> Leaf:
        """What a method made of `whole(leaf)`, in the leaf's own shape."""
        shape = self._leaves[leaf][1][0].shape
        if self.unit != "row" or len(shape) < 2:
            return merged.reshape(shape)
        axis = self.input_axis % len(shape)
        rest = [size for n, size in enumerate(shape) if n != axis]
        return self.xp.moveaxis(merged.reshape(*rest, shape[axis]), -1, axis)

    def _shape(self, array, wide):
        # JAX has float64 only where it was asked for, and warns where it has not.
        array = array.astype(wide, copy=False) if self.xp is np else array.astype(_canonical(wide))
        if self.unit == "leaf":
            return array
        if self.unit == "element":
            return array.reshape(-1)
        if array.ndim < 2:
            return array.reshape(1, -1)
        moved = self.xp.moveaxis(array, self.input_axis, -1)
        return moved.reshape(-1, moved.shape[-1])


def rank_values(xp: Any, values: Leaf, count: Any) -> Rank:
    """`View.rank_from_top` of values that are all here."""
    size = values.shape[0]
    if size == 0:
        return Rank(xp.asarray(xp.inf), xp.asarray(-1))
    order = xp.argsort(-values, stable=True) if xp is not np else np.argsort(-values, kind="stable")
    # With count 0 nothing is kept: no value exceeds infinity.
    at = xp.clip(xp.asarray(count) - 1, 0, size - 1)
    value = xp.where(xp.asarray(count) > 0, values[order[at]], xp.inf)
    return Rank(value, xp.where(xp.asarray(count) > 0, order[at], -1))


def merge_trees(
    method: Method,
    models: Sequence[Params],
    base: Params | None = None,
    *,
    seed: int = 0,
    input_axis: int = 0,
    extras: Sequence[Params] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One model of several, leaf by leaf, in memory.

    Args:
        method: As the registry has it.
        models: Trees of the same paths and shapes.
        base: What the task vectors are counted from; None for methods without one.
        seed: Of random methods.
        input_axis: Axis of matrices that runs along their inputs: 0 in trees of ours, -1 in files of torch.
        extras: What the method needs beside weights (`Method.data`), one tree a model, by the same paths; a leaf may
            have none.
        **options: The method's own, as recipes spell them; per-model ones as one value, or a sequence with one a model.

    Returns:
        The tree of the base (without one: of the first model), every leaf rounded once to its dtype there. Leaves that
        are no floats are the base's and must be equal in all.

    Raises:
        TreeMismatchError: paths, shapes or integer leaves differ.
        ConfigError: number of models, a base too many or too few, or an option's value makes no sense.
        UnknownNameError: no such option.
    """
    named = {f"model {n}": model for n, model in enumerate(models)}
    if base is not None:
        named = {"base": base, **named}
    check_same(named)
    if (method.data == "none") != (extras is None):
        needed = f"needs {method.data}, one tree a model" if extras is None else "needs nothing beside weights"
        raise ConfigError(f"this merge method {needed}: see `extras`.")
    if extras is not None:
        check_same({f"{method.data} of model {n}": tree for n, tree in enumerate(extras)})
        if len(extras) != len(models):
            raise ConfigError(f"`extras`: expected {len(models)} trees of {method.data}, got {len(extras)}.")
    options = check_options(method, options, len(models), has_base=base is not None)
    flats = [flatten(model) for model in models]
    like = flats[0] if base is None else flatten(base)
    beside = [flatten(tree) for tree in extras or ()]
    unknown = [path for path in (beside[0] if beside else ()) if path not in like]
    if unknown:
        raise TreeMismatchError(f"{method.data} of leaves that no model has: {', '.join(unknown[:5])}.")
    paths = [path for path in like if is_float(like[path])]

    def view_of(some):
        leaves = [[read(flat[path]) for flat in flats] for path in some]
        bases = [read(like[path]) if base is not None else None for path in some]
        more = None
        if beside:
            more = [[read(tree[path]) for tree in beside] if path in beside[0] else None for path in some]
        unit = method.unit_of(options, like[some[0]].shape, input_axis)
        return ArrayView(some, leaves, bases, unit=unit, input_axis=input_axis, seed=seed, extras=more)

    merged = {path: _copy_equal(path, like, flats) for path in like if path not in paths}
    groups = [paths] if options.get(method.scope_option) == "model" else [[path] for path in paths]
    for some in filter(None, groups):
        view = view_of(some)
        combine = method.prepare(view, options)
        for n, path in enumerate(some):
            made = view.fold_back(n, combine(view.whole(n)))
            merged[path] = made.astype(like[path].dtype)
    return unflatten({path: merged[path] for path in like})


def _copy_equal(path, like, flats):
    for n, flat in enumerate(flats):
        if not np.array_equal(np.asarray(like[path]), np.asarray(flat[path])):
            raise TreeMismatchError(
                f"{path}: {like[path].dtype} leaves are copied and not merged, and that of model {n} is another. "
                "Make them equal, or leave the leaf out with tree.select."
            )
    return like[path]


def compute_dtype(dtype: Any) -> np.dtype:
    """float32 for bfloat16 and the float8 types, whose mantissa leaves it 16 bits to spare; float64 for the rest."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float64 if dtype in (np.float16, np.float32, np.float64) else np.float32)


def _jax_numpy():
    import jax.numpy as jnp

    return jnp


def _canonical(dtype):
    import jax

    return jax.dtypes.canonicalize_dtype(dtype)
