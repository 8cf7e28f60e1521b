"""Which tensors of a base an adapter changes, and where their axes lie in our leaves."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxtune.adapters.config import is_targeted
from jaxtune.adapters.folder import Adapter, LowRank
from jaxtune.errors import TreeMismatchError
from jaxtune.models.keys import KeyTable, Row
from jaxtune.tree import MAX_LINES, describe_leaf, flatten
from jaxtune.types import Leaf, Params

# What transformers 5 calls otherwise than the files that it writes: network -> file.
RENAMED = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."))
# The same of vision transformers: of DINOv2, and of ViT and DeiT. First what is part of no other.
DINO = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
)
VIT = (*DINO, (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."), ("layers.", "encoder.layer."))
# Token table of a file without the words that a network with a head puts in front -> those words.
TRUNKS = {"wte.weight": "transformer.", "embed_tokens.weight": "model.", "embed_in.weight": "gpt_neox."}


@dataclass(frozen=True)
class Matrix:
    """One stored matrix that has factors.

    Attributes:
        name: Of the stored tensor.
        row: Of the key table.
        low_rank: The factors.
        shape: Of the stored tensor.
        input_axis: Which axis of the stored tensor the factor A reads with: 1 in torch's Linear, 0 in tables of
            embeddings and in GPT-2's Conv1D.
        copies: Factors of a tied tensor, which hold the same transposed.
    """

    name: str
    row: Row
    low_rank: LowRank
    shape: tuple[int, int]
    input_axis: int
    copies: tuple[LowRank, ...] = ()


@dataclass(frozen=True)
class Whole:
    """One stored tensor that is replaced.

    Attributes:
        name: Of the stored tensor.
        row: Of the key table.
        tensor: Name in the adapter's file.
        copies: The same of tied tensors.
    """

    name: str
    row: Row
    tensor: str
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """Where one factor lies in one leaf.

    Attributes:
        axes: Axes of the leaf that the factor has.
        index: Which entry of the factor's long axis stands where: int[...], one axis for each of `axes`.
    """

    axes: tuple[int, ...]
    index: np.ndarray

    def view(self, factor: np.ndarray, ndim: int) -> np.ndarray:
        """The factor as a leaf whose other axes are one axis of the rank, and of length 1.

        Shapes:
            factor: float[long, rank]; result: `ndim` axes.
        """
        others = [axis for axis in range(ndim) if axis not in self.axes]
        spread = factor[self.index.reshape(-1)].reshape(*self.index.shape, factor.shape[1])
        spread = np.expand_dims(spread, [spread.ndim + n for n in range(len(others) - 1)])
        return np.moveaxis(spread, range(ndim), [*self.axes, *others])

    def unview(self, leaf: np.ndarray, long: int) -> np.ndarray:
        """The way back, where this side has entries: float[long, rank], NaN elsewhere."""
        others = [axis for axis in range(leaf.ndim) if axis not in self.axes]
        flat = np.moveaxis(leaf, [*self.axes, *others], range(leaf.ndim)).reshape(self.index.size, -1)
        factor = np.full((long, flat.shape[1]), np.nan, leaf.dtype)
        factor[self.index.reshape(-1)] = flat
        return factor


def bind(adapter: Adapter, table: KeyTable, base: Params) -> tuple[list[Matrix], list[Whole]]:
    """Finds what the adapter changes in the key table of its base.

    Args:
        adapter: As `read_adapter` gives it.
        table: Of the base.
        base: Our tree of it; only shapes are read.

    Raises:
        TreeMismatchError: a tensor that the base does not have or has in another shape; one of two tied tensors alone;
            lists them.
    """
    leaves, rows = flatten(base), {name: row for row in table.rows for name in row.names}
    wanted = {f"{low.module}.weight" for low in adapter.low_rank} | set(adapter.whole)
    stored_of = _resolve(wanted, [*rows, *table.ties])
    lines = _check_ties(adapter, table, stored_of)
    matrices, wholes = [], []
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def shape_of(name):
        row = rows[name]
        if row.names[0] not in shapes:
            shapes[row.names[0]] = _stored_shapes(row, leaves)
        return shapes[row.names[0]][name]

    for low in adapter.low_rank:
        name = stored_of[f"{low.module}.weight"]
        if name in table.ties:
            continue
        if not is_targeted(adapter.config, low.module):
            lines.append(f"  {name}: has factors, and adapter_config.json does not target {low.module}")
        a, b, shape = adapter.tensors[low.a], adapter.tensors[low.b], shape_of(name)
        row, axis = rows[name], None
        if len(shape) == 2 and all(path.split("/")[-1] != "scale" for path in row.leaves):
            axis = _one_tensor(row, name).trace(row.leaves[0], 2)[0]  # kernels and tables have their inputs first
        sides = (a.shape[1], b.shape[0])
        if axis is None or sides != (shape[axis], shape[1 - axis]):
            lines.append(f"  {name}: {list(shape)} in the base, factors {describe_leaf(a)} and {describe_leaf(b)}")
            continue
        copies = tuple(
            other for other in adapter.low_rank if table.ties.get(stored_of[f"{other.module}.weight"]) == name
        )
        matrices.append(Matrix(name, row, low, shape, axis, copies))
    for own, tensor in adapter.whole.items():
        name = stored_of[own]
        if name in table.ties:
            continue
        if adapter.tensors[tensor].shape != shape_of(name):
            lines.append(f"  {name}: {list(shape_of(name))} in the base, {describe_leaf(adapter.tensors[tensor])} here")
            continue
        copies = tuple(other for twin, other in adapter.whole.items() if table.ties.get(stored_of[twin]) == name)
        wholes.append(Whole(name, rows[name], tensor, copies))
    if lines:
        raise TreeMismatchError(
            f"the adapter{_where(adapter)} does not fit its base in {len(lines)} places:\n"
            + "\n".join(lines[:MAX_LINES])
            + "\nGive the base that it was trained on."
        )
    return matrices, wholes


def sides_of(matrix: Matrix, path: str) -> tuple[Side, Side]:
    """(input side, output side) of one of the leaves that a matrix becomes."""
    row = _one_tensor(matrix.row, matrix.name)
    origins, sides = row.trace(path, 2), []
    for axis in (matrix.input_axis, 1 - matrix.input_axis):
        count = np.arange(matrix.shape[axis], dtype=np.int32).reshape((-1, 1) if axis == 0 else (1, -1))
        where = row.decode({matrix.name: np.broadcast_to(count, matrix.shape)})[path]
        axes = tuple(n for n, origin in enumerate(origins) if origin == axis)
        # Along all other axes the index is the same.
        sides.append(Side(axes, where[tuple(slice(None) if n in axes else 0 for n in range(where.ndim))]))
    return sides[0], sides[1]


def network_name(name: str, table: KeyTable) -> str:
    """What the network of transformers 5 calls a stored tensor."""
    renamed = RENAMED
    if VIT[-1][1] in name:  # of BERT too, which keeps its names
        stored = [one for row in table.rows for one in row.names]
        if any(DINO[0][1] in one for one in stored):
            renamed = VIT if any(VIT[4][1] in one for one in stored) else DINO
    for ours, theirs in renamed:
        name = name.replace(theirs, ours)
    # A file of the trunk alone, with a head that is tied to its table: the older GPT-2 on the hub.
    trunk = next((TRUNKS[table_name] for table_name in table.ties.values() if table_name in TRUNKS), "")
    return name if name in table.ties else trunk + name


def is_stacked(row: Row) -> bool:
    """Whether a leaf holds several stored tensors, as that of experts stored one by one does."""
    return len(row.names) > 1


def group_rows(matrices: list[Matrix], wholes: list[Whole]) -> Iterator[tuple[Row, list[Matrix], list[Whole]]]:
    """Every row that the adapter touches, once, with what it touches there."""
    rows: dict[tuple[str, ...], Row] = {change.row.names: change.row for change in [*matrices, *wholes]}
    for names, row in rows.items():
        yield row, [m for m in matrices if m.row.names == names], [w for w in wholes if w.row.names == names]


def _one_tensor(row, name):
    """The row as it reads one of its tensors."""
    return replace(row, stored=name)


def _stored_shapes(row, leaves: Mapping[str, Leaf]):
    shadows = {path: np.broadcast_to(np.zeros((), bool), leaves[path].shape) for path in row.leaves}
    return {name: tensor.shape for name, tensor in row.encode(shadows).items()}


def _resolve(wanted, known):
    """Name in the network -> stored name: as it is, or with another first word, the same for all."""
    known = set(known)
    firsts = sorted({name.split(".")[0] for name in known})
    ways = [lambda name: name, lambda name: name.partition(".")[2]]
    ways += [lambda name, first=first: f"{first}.{name}" for first in firsts]
    best = None
    for way in ways:
        found = {name: _find(way(name), known) for name in wanted}
        missing = sorted(name for name, stored in found.items() if stored is None)
        if best is None or len(missing) < len(best[1]):
            best = found, missing
    found, missing = best
    if missing:
        more = f"\n  ... and {len(missing) - MAX_LINES} more" if len(missing) > MAX_LINES else ""
        raise TreeMismatchError(
            f"the adapter changes {len(missing)} tensors that its base does not have:\n"
            + "\n".join(f"  {name}" for name in missing[:MAX_LINES])
            + more
            + "\nGive the base that it was trained on. A head that the adapter brings along (a classifier, a resized "
            "table) must be in the base: save the base with that head first."
        )
    return found


def _find(name, known):
    options = [name] + [name.replace(ours, theirs) for ours, theirs in RENAMED]
    for renamed in (DINO, VIT):
        options.append(functools.reduce(lambda name, pair: name.replace(*pair, 1), renamed, name))
    return next((option for option in options if option in known), None)


def _check_ties(adapter, table, stored_of):
    """Complaints about tied tensors that the adapter takes apart: our tree has one leaf for both."""
    lines = []
    factors = {stored_of[f"{low.module}.weight"]: low for low in adapter.low_rank}
    wholes = {stored_of[own]: tensor for own, tensor in adapter.whole.items()}
    for twin, name in table.ties.items():
        for found in (factors, wholes):
            if (twin in found) != (name in found):
                one, other = (twin, name) if twin in found else (name, twin)
                lines.append(f"  {one}: changed, and {other}, which is tied to it, is not")
        if twin in factors and name in factors and not _are_transposed(adapter, factors[name], factors[twin]):
            lines.append(f"  {twin}: tied to {name}, with factors of its own")
        if twin in wholes and name in wholes:
            first, second = (adapter.tensors[wholes[key]] for key in (name, twin))
            if first.shape != second.shape or not np.array_equal(first, second):
                lines.append(f"  {twin}: tied to {name}, and differs from it in the adapter")
    return lines


def _are_transposed(adapter, first: LowRank, second: LowRank):
    tensors = adapter.tensors
    pairs = ((tensors[first.a], tensors[second.b].T), (tensors[first.b], tensors[second.a].T))
    return first.scale == second.scale and all(np.array_equal(one, other) for one, other in pairs)


def _where(adapter):
    return f" {adapter.path}" if adapter.path else ""
