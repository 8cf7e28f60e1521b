"""Tables between a checkpoint's own tensors and our tree: every tensor used once, every leaf filled once.

A row names stored tensors, our leaves and how the axes of one become the axes of the other, in the notation of
einops (Rogozhnikov 2022): `"(head unit) width -> width head unit"` reads torch's `Linear` weight [out, in] as a kernel
with heads. Both directions come from the one row, so what was read is written back byte for byte.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.errors import TreeMismatchError
from jaxtune.lazy import LazyLeaf, defer_made
from jaxtune.tree import MAX_LINES, flatten, unflatten
from jaxtune.types import Leaf, Params

LINEAR = "out in -> in out"


@dataclass(frozen=True)
class Row:
    """One or several stored tensors and the leaves that hold the same numbers.

    One tensor and one leaf: `pattern` alone. One tensor and several leaves (fused projections): the tensor, after
    `before`, is cut along its first axis into parts of `sizes`, and each part goes through `pattern`. Several tensors
    and one leaf (experts stored one by one): each goes through `pattern`, and they are stacked along a new first axis.

    Attributes:
        stored: Name or names of stored tensors.
        paths: Path or paths of our leaves.
        pattern: "stored axes -> our axes"; a group "(a b)" is one axis that holds both, the later faster. "" leaves
            the axes as they are. "1" on the left is an axis of length 1 that is dropped, on the right one that is
            added. A tuple holds one pattern per path, where the parts of a fused tensor differ.
        dims: Length of every named axis that stands in a group, save one a group.
        sizes: Lengths of the parts along the first axis, one per path.
        before: Pattern that brings the axis to cut to the front.
    """

    stored: str | tuple[str, ...]
    paths: str | tuple[str, ...]
    pattern: str | tuple[str, ...] = ""
    dims: Mapping[str, int] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    before: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Stored names, as a tuple."""
        return (self.stored,) if isinstance(self.stored, str) else self.stored

    @property
    def leaves(self) -> tuple[str, ...]:
        """Paths, as a tuple."""
        return (self.paths,) if isinstance(self.paths, str) else self.paths

    @property
    def patterns(self) -> tuple[str, ...]:
        """The pattern of every path."""
        return (self.pattern,) * len(self.leaves) if isinstance(self.pattern, str) else self.pattern

    def decode(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Our leaves from the stored tensors; views, except of what is stacked."""
        if len(self.leaves) > 1:
            whole = rearrange(tensors[self.names[0]], self.before, self.dims)
            if not whole.ndim or len(whole) != sum(self.sizes):
                raise ValueError(f"the first axis of {list(whole.shape)} should be {sum(self.sizes)} long")
            parts = np.split(whole, np.cumsum(self.sizes)[:-1])
            triples = zip(self.leaves, parts, self.patterns, strict=True)
            return {path: rearrange(part, pattern, self.dims) for path, part, pattern in triples}
        parts = [rearrange(tensors[name], self.patterns[0], self.dims) for name in self.names]
        if len({part.dtype for part in parts}) > 1:
            raise ValueError("they become one leaf and have several dtypes")
        return {self.leaves[0]: parts[0] if isinstance(self.stored, str) else np.stack(parts)}

    def decode_lazily(self, tensors: Mapping[str, np.ndarray]) -> dict[str, LazyLeaf]:
        """The same, each leaf made from the mapped tensors when it is read."""
        own = {name: tensors[name] for name in self.names}
        shadows = {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in own.items()}
        if isinstance(self.stored, str):
            looks = {path: (leaf.shape, leaf.dtype) for path, leaf in self.decode(shadows).items()}
        else:  # one look stands for all: stacking them would make the leaf
            parts = [rearrange(shadow, self.patterns[0], self.dims) for shadow in shadows.values()]
            if len({(part.shape, part.dtype) for part in parts}) > 1:
                raise ValueError("they become one leaf and differ in shape or dtype")
            looks = {self.leaves[0]: ((len(parts), *parts[0].shape), parts[0].dtype)}

        def make(path):
            return lambda: self.decode(own)[path]

        return {path: defer_made(*look, make(path), list(own.values())) for path, look in looks.items()}

    def trace(self, path: str, ndim: int) -> tuple[int | None, ...]:
        """Which axis of a stored tensor every axis of the leaf at `path` comes from; None for one that was added.

        Of stacked tensors, the axes behind the one that counts them. Axes of length 1 are traced too.

        Args:
            path: One of `leaves`.
            ndim: Number of axes of the stored tensor.

        Raises:
            ValueError: the tensor has other axes than the pattern, or an axis of ours joins two of its.
        """
        axes = _follow(self.before, tuple(range(ndim)))
        return _follow(self.patterns[self.leaves.index(path)], axes)

    def encode(self, leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
        """The stored tensors from our leaves."""
        if len(self.leaves) > 1:
            pairs = zip(self.leaves, self.patterns, strict=True)
            parts = [rearrange(np.asarray(leaves[path]), reverse(pattern), self.dims) for path, pattern in pairs]
            # Groups of the way back are as long as they were: all lengths of `before` are in `dims` or whole axes.
            return {self.names[0]: rearrange(np.concatenate(parts), reverse(self.before), self.dims)}
        whole = np.asarray(leaves[self.leaves[0]])
        parts = [whole] if isinstance(self.stored, str) else whole
        back = reverse(self.patterns[0])
        return {name: rearrange(part, back, self.dims) for name, part in zip(self.names, parts, strict=True)}


@dataclass(frozen=True)
class KeyTable:
    """How one checkpoint's tensors become our tree and come back.

    Attributes:
        rows: Every stored tensor and every leaf in exactly one row.
        ties: Stored name -> the stored name that it repeats (a tied output layer that is stored as well): must be
            equal when read, is written from the same leaf.
        ignored: Regular expressions of stored names that are no weights (position ids, rotary frequencies, causal
            masks): left out of the tree, carried along as they are.
    """

    rows: tuple[Row, ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def is_ignored(self, name: str) -> bool:
        """Whether a stored name is carried along and not read."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def check(self, names: Iterable[str]) -> None:
        """Checks the table against the names of a checkpoint, both ways.

        Raises:
            TreeMismatchError: names that no row reads, and rows that find nothing.
        """
        names = set(names)
        known = [name for row in self.rows for name in row.names]
        paths = [path for row in self.rows for path in row.leaves]
        twice = (
            {name for group in (known, paths) for name in group if group.count(name) > 1}
            if (len(set(known)) < len(known) or len(set(paths)) < len(paths))
            else set()
        )
        lines = [f"  {name}: twice in the key table" for name in sorted(twice)]
        lines += [
            f"  {name}: in the file, not known to this family"
            for name in sorted(names - set(known) - set(self.ties))
            if not self.is_ignored(name)
        ]
        lines += [f"  {name}: expected, not in the file" for name in known if name not in names]
        if lines:
            more = [f"  ... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
            raise TreeMismatchError(
                f"the tensors are not this family's in {len(lines)} places:\n"
                + "\n".join(lines[:MAX_LINES] + more)
                + "\nEvery tensor must be understood: a name left over may carry weights that would be lost. Check "
                '"model_type" and "architectures" in config.json.'
            )

    def decode(self, tensors: Mapping[str, np.ndarray], *, lazy: bool = False) -> dict[str, Any]:
        """Our tree of a checkpoint's tensors.

        Args:
            tensors: Stored name -> array; views of mapped files where `lazy`.
            lazy: Whether each leaf is made when it is read (`jaxtune.lazy`).

        Raises:
            TreeMismatchError: as `check`; a tensor of another shape than its row says; tied names that differ.
        """
        self.check(tensors)
        for name, original in self.ties.items():
            if name in tensors and not np.array_equal(_bits(tensors[name]), _bits(tensors[original])):
                raise TreeMismatchError(
                    f"{name} and {original} are tied by config.json and differ in the file. "
                    'Set "tie_word_embeddings" to false if they are meant to differ, or drop one.'
                )
        leaves: dict[str, Leaf] = {}
        for row in self.rows:
            try:
                leaves |= row.decode_lazily(tensors) if lazy else row.decode(tensors)
            except ValueError as error:
                shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in row.names[:3])
                raise TreeMismatchError(
                    f"{shapes}: does not read as {row.pattern or 'it is'} with {dict(row.dims)}: {error}. "
                    "The sizes in config.json are not those of the tensors."
                ) from error
        return unflatten(leaves)

    def encoder(self, params: Params, carried: Mapping[str, np.ndarray]) -> Callable[[str], np.ndarray]:
        """Stored name -> its tensor, row by row: what lies in several leaves is joined when it is asked for.

        Args:
            params: Our tree.
            carried: Stored tensors that are ignored, as they came.

        Raises:
            TreeMismatchError: the tree has other leaves than the table.
        """
        leaves = flatten(params)
        paths = {path for row in self.rows for path in row.leaves}
        if paths != leaves.keys():
            odd = sorted(paths ^ leaves.keys())
            raise TreeMismatchError(
                f"the tree differs from the checkpoint's in {len(odd)} paths: {', '.join(odd[:MAX_LINES])}. "
                "Write a tree of another architecture as a fresh checkpoint: jaxtune.save(path, params, config=...)."
            )
        row_of = {name: row for row in self.rows for name in row.names}

        def tensor_of(name):
            name = self.ties.get(name, name)
            return row_of[name].encode(leaves)[name] if name in row_of else carried[name]

        return tensor_of


@dataclass(frozen=True)
class Codec:
    """A key table at work on one checkpoint: what `checkpoint.Layout` needs to write our tree as it was stored.

    Attributes:
        table: Of the family.
        carried: Stored tensors that are no weights, as they came.
        leaves: Path -> the leaf as it was read, for its dtype and shape.
    """

    table: KeyTable
    carried: Mapping[str, np.ndarray]
    leaves: Mapping[str, np.ndarray]

    def encoder(self, params: Params) -> Callable[[str], np.ndarray]:
        """Stored name -> its tensor, made from `params` when asked for."""
        return self.table.encoder(params, self.carried)


def rearrange(tensor: np.ndarray, pattern: str, dims: Mapping[str, int] | None = None) -> np.ndarray:
    """Splits, moves and joins axes: a view where NumPy can make one.

    Raises:
        ValueError: the tensor does not have the axes that the pattern says.
    """
    if not pattern:
        return tensor
    left, right = _parse(pattern)
    if tensor.ndim != len(left):
        raise ValueError(f"{tensor.ndim} axes where {pattern.split('->')[0].strip()!r} has {len(left)}")
    lengths: dict[str, int] = {}
    for group, size in zip(left, tensor.shape, strict=True):
        known = math.prod((dims or {})[name] for name in group if name in (dims or {}))
        free = [name for name in group if name not in (dims or {})]
        if len(free) > 1 or (not free and known != size) or size % known:
            raise ValueError(f"an axis of {size} is not ({' '.join(group)}) with {dict(dims or {})}")
        lengths |= {name: (dims or {})[name] for name in group if name in (dims or {})}
        lengths |= dict.fromkeys(free, size // known)
    names = [name for group in left for name in group]
    tensor = tensor.reshape([lengths[name] for name in names])
    order = [names.index(name) for group in right for name in group]
    if sorted(order) != list(range(len(names))):
        raise ValueError(f"{pattern!r} names different axes on its two sides")
    return tensor.transpose(order).reshape([math.prod(lengths[name] for name in group) for group in right])


def reverse(pattern: str) -> str:
    """The pattern of the way back."""
    return " -> ".join(reversed([side.strip() for side in pattern.split("->")])) if pattern else ""


def _follow(pattern, origins):
    """Where the axes on the right of a pattern come from, given where those on the left do."""
    if not pattern:
        return origins
    left, right = _parse(pattern)
    origin_of = {name: origin for group, origin in zip(left, origins, strict=True) for name in group}
    found = [{origin_of[name] for name in group} for group in right]
    if any(len(origin) > 1 for origin in found):
        raise ValueError(f"{pattern!r} joins two axes into one")
    return tuple(next(iter(origin), None) for origin in found)


def _parse(pattern):
    """Axes of both sides, each a tuple of names; a bare "1" is a group of none."""
    sides = []
    for side in pattern.split("->"):
        groups = re.findall(r"\(([^)]*)\)|(\S+)", side)
        sides.append(
            [tuple(many.split()) if many or not one else (() if one == "1" else (one,)) for many, one in groups]
        )
    return sides


def _bits(tensor):
    """Bytes, so that NaN equals itself and dtypes are compared."""
    return np.ascontiguousarray(tensor).view(np.uint8)
