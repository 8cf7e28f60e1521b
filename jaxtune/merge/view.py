"""What a merge method sees of one leaf of several models: runs of elements, sums over them, order statistics.

A method is written once, against a `View`, and runs on arrays in memory (NumPy, or JAX under `jit`) as well as on
files that are read piece by piece (`jaxtune.stream`): it asks the view for the few numbers that it needs of the whole
leaf, and answers with a function of a run of elements.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.merge.aligned import copy_aligned
from jaxtune.merge.masks import pack
from jaxtune.merge.random_bits import Stream, draw_below, draw_uniform
from jaxtune.types import Leaf


class MadeOnUse(Sequence):
    """A sequence whose items are made when they are asked for, and kept."""

    def __init__(self, length: int, make: Callable[[int], Leaf]):
        self._length, self._make, self._made = length, make, {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, n):
        if isinstance(n, slice):
            return tuple(self[k] for k in range(self._length)[n])
        n = range(self._length)[n]
        if n not in self._made:
            self._made[n] = self._make(n)
        return self._made[n]

    def own(self, n: int) -> Leaf:
        """An item that the caller may write into: made for it alone, unless it is kept and has to be copied."""
        return copy_aligned(self._made[n], self._made[n].dtype) if n in self._made else self._make(n)


@dataclass(frozen=True)
class Elements:
    """Some elements of one leaf, in its order, of all models.

    Attributes:
        xp: `numpy` or `jax.numpy`: whichever the arrays belong to.
        models: One array a model, in the dtype of the arithmetic; where they come from a file, read when asked for.
        base: The same of the base; None where the method has none.
        start: Place of the first of them in the flattened leaf (of a view of many leaves: in all of them), an integer.
        streams: One stream of random bits a model.
        extras: What the method needs beside weights (`Method.data`), one array a model; None: this leaf has none.
        memo: Where `remember` keeps the masks of this run; None: nowhere.

    Shapes:
        models[k], base: [num_elements] for a method of unit "element"; [num_rows, row_length] for "row"; the leaf's own
            for "leaf".
        extras[k]: As `models[k]`; for "leaf" the data's own.
    """

    xp: Any
    models: Sequence[Leaf]
    base: Leaf | None
    start: Any
    streams: tuple[Stream, ...]
    extras: Sequence[Leaf] | None = None
    memo: Any = None

    @functools.cached_property
    def deltas(self) -> Sequence[Leaf]:
        """The task vectors: every model minus the base; each is made when it is asked for."""
        # Nothing that is kept here may refer to all of this: what refers to itself is freed late, block after block.
        return MadeOnUse(len(self.models), functools.partial(_own_delta, self.models, self.base))

    def own_model(self, model: int) -> Leaf:
        """One model for a caller who uses it once, and may write into it where arrays can be written into."""
        return _own(self.models, model)

    def own_delta(self, model: int) -> Leaf:
        """One task vector, likewise."""
        return _own_delta(self.models, self.base, model)

    def own_base(self) -> Leaf:
        """The base, likewise."""
        return _own((self.base,), 0)

    def uniform(self, model: int) -> Leaf:
        """Numbers in [0, 1) of one model, which depend on seed, model, leaf and element alone; float32."""
        return draw_uniform(self.xp, self.streams[model], self.start, self.base.shape)

    def below(self, model: int, share: Any) -> Leaf:
        """True with probability `share`: random bits of one model, as `uniform` has them, at half the cost."""
        return draw_below(self.xp, self.streams[model], self.start, self.base.shape, share)

    def remember(self, key: Any, make: Callable[[], Leaf]) -> Leaf:
        """A mask that a method needs in more than one pass over a leaf: made once where there is room to keep its bits.

        Args:
            key: Of the mask, among those of this leaf.
            make: Makes it: bool, one an element.

        Returns:
            The mask; on the host its bits, packed: see `masks.keep`.
        """
        if self.xp is not np:
            return make()
        if self.memo is None:
            return pack(make())
        if key not in self.memo:
            self.memo[key] = pack(make())
        return self.memo[key]

    @property
    def dtype(self) -> Any:
        """Of the arithmetic."""
        return (self.models[0] if self.base is None else self.base).dtype

    @functools.cached_property
    def index(self) -> Leaf:
        """Place of each element in the flattened leaf (of a view of many leaves: in all of them), an integer."""
        shape = self.models[0].shape
        wide = self.xp.arange(math.prod(shape), dtype=np.int64 if self.xp is np else None)
        return (wide + self.start).reshape(shape)


def _own(arrays, n):
    if isinstance(arrays, MadeOnUse):
        return arrays.own(n)
    # An array of NumPy may meet `jax.numpy` too: a scalar among leaves does.
    return copy_aligned(arrays[n], arrays[n].dtype) if isinstance(arrays[n], np.ndarray) else arrays[n]


def _own_delta(models, base, model):
    delta = _own(models, model)
    delta -= base
    return delta


@dataclass(frozen=True)
class Combine:
    """What a method makes of a leaf: a function of a run of elements, and the numbers it found out before.

    Attributes:
        function: (elements, *numbers) -> array of the run's shape. A function of a module and no closure: it is
            compiled once and gets the numbers of every leaf as arguments.
        numbers: Scalars and small arrays.
        constants: Keyword arguments that are compiled in: flags, names, counts.
    """

    function: Callable[..., Leaf]
    numbers: tuple[Any, ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()

    def __call__(self, elements: Elements) -> Leaf:
        """The merged elements."""
        return self.function(elements, *self._numbers_for(elements), **dict(self.constants))

    def _numbers_for(self, elements):
        if elements.xp is not np:
            return weaken(self.numbers, elements)
        if elements.dtype not in self._weakened:
            self._weakened[elements.dtype] = weaken(self.numbers, elements)
        return self._weakened[elements.dtype]

    @functools.cached_property
    def _weakened(self):
        return {}


@dataclass(frozen=True)
class Rank:
    """The element at a rank among values that are ordered by size, equal values by place, first of all the earliest.

    Attributes:
        value: The value at that rank; infinite where none is asked for.
        last: Place of the last element of this very value that is within the rank.
    """

    value: Any
    last: Any

    def keeps(self, values: Leaf, index: Leaf) -> Leaf:
        """Which elements are within the rank: exactly as many as were asked for."""
        return (values > self.value) | ((values == self.value) & (index <= self.last))


class View(ABC):
    """One leaf of several models (for a method of scope "model": all leaves of them, one after another).

    Attributes:
        name: Path of the leaf, or name of the tensor.
        shape: Of the leaf.
        num_models: Without the base.
        has_base: Whether there is one.
        input_axis: Axis that runs along the inputs of a matrix: -1 in files of torch, 0 in our trees.
        xp: `numpy` or `jax.numpy`: of numbers about the whole leaf.
        unit: Of its runs, as `Method.unit_of` says.
        dtype: Of the arithmetic.
        seed: Of random bits.
        extra_shapes: For a method that needs more than weights, the shapes of `Elements.extras`, leaf by leaf, None for
            leaves without any; None: no such data was given.
    """

    name: str
    shape: tuple[int, ...]
    num_models: int
    has_base: bool
    input_axis: int
    xp: Any
    unit: str
    dtype: Any
    seed: int = 0
    extra_shapes: Sequence[tuple[int, ...] | None] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @abstractmethod
    def reduce(self, function: Callable[..., Leaf], *numbers: Any, **constants: Any) -> Leaf:
        """Sum over runs of `function(elements, *numbers, **constants)`, an array of any one shape.

        The runs, and with them the last bit, depend on the leaf alone: not on memory, threads or devices. Sums inside
        `function` accumulate in float64 where the view is NumPy's (`sum_wide`).
        """

    @abstractmethod
    def add_up(self, function: Callable[..., Leaf], *numbers: Any, num_rows: int, **constants: Any) -> np.ndarray:
        """As `reduce`, of a large result: over runs of `num_rows` whole rows, one after another, in float64.

        For views of unit "row" of one leaf, on the host.
        """

    @abstractmethod
    def rank_from_top(self, function: Callable[..., Leaf], count: Any, *numbers: Any, **constants: Any) -> Any:
        """The `count` largest of `function(elements, *numbers, **constants)`, one value >= 0 an element.

        Equal values count in the order of their place, so that exactly `count` are within the rank; with 0 none is.

        Returns:
            A `Rank`; of a tuple of counts a tuple of them, for the price of one.
        """


def weaken(number: Any, elements: Elements) -> Any:
    """A number of NumPy in the dtype of the elements it meets, which it would widen: of leaves all is known in float64.

    Plain Python numbers, the options of a method, widen nothing.
    """
    if isinstance(number, tuple):
        return tuple(weaken(one, elements) for one in number)
    if isinstance(number, Rank):
        return Rank(weaken(number.value, elements), number.last)
    if isinstance(number, (np.ndarray, np.floating)) and number.dtype.kind == "f":
        return number.astype(elements.dtype, copy=False)
    return number
