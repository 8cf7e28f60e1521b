"""What a resolved recipe says of every tensor of the output: from which tensors it is made, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Donor:
    """Rows of a stored tensor that fill rows of an output: one a filled row, -1 where it gives none."""

    model: int
    name: str
    rows: np.ndarray


@dataclass(frozen=True)
class Fill:
    """Rows of a source that none of its own rows stands for, and what does: a rule, for no weights are read yet.

    Attributes:
        rows: Rows of the output, rising: int64[k].
        kind: "mean": of the donors' rows, those that are not -1, in float32 or wider (of one donor: its row as it is);
            "zero"; "own_mean": of all rows of the output as this source has them before this fill (rows to pad with).
        donors: Of "mean"; every row has at least one.
    """

    rows: np.ndarray
    kind: Literal["mean", "zero", "own_mean"]
    donors: tuple[Donor, ...] = ()


@dataclass(frozen=True)
class Source:
    """A stored tensor that goes into one of the output.

    Attributes:
        model: Index into `MergeJobs.models`.
        name: Of the tensor there.
        rows: Row of this tensor for each row of the output, -1 for none (then `fills` say what stands there);
            None where rows are the same.
        filler: Values of rows that no row of this tensor gives: float32[num such rows, ...], in their order. A recipe
            leaves it out; `fills.fill_rows` makes it of `fills` once weights may be read.
        fills: One rule for every row that is -1; "own_mean" comes last.
        data: Array of what the method needs beside this tensor (its Fisher, its Gram), mapped from its file; None where
            there is none.
    """

    model: int
    name: str
    rows: np.ndarray | None = None
    filler: np.ndarray | None = None
    fills: tuple[Fill, ...] = ()
    data: Any = None


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output.

    Attributes:
        name: In the output.
        shape: In the output.
        dtype: Of the arithmetic's inputs: every source is rounded to it first, as a recipe's `dtype` says; None where
            sources are taken as they are stored.
        out_dtype: As it is stored.
        method: A key of `merge.registry.METHODS`; "copy" where the first source is taken byte for byte: all others,
            and the base, must hold the same (integers, booleans), or there are none.
        sources: One a model that goes in, in the order of the recipe; the base is not among them.
        base: Its source; None where the method has none.
        options: Option -> value; of per-model options a tuple with one a source.
        post: Post-steps (name, options), in their order.
        layer: Of the output, in the module it belongs to; None outside of the layers.
        num_layers: How many layers that module has in the output; None without layers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    out_dtype: np.dtype
    method: str
    sources: tuple[Source, ...]
    base: Source | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    post: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    layer: int | None = None
    num_layers: int | None = None


@dataclass(frozen=True)
class Transported:
    """A model that is carried to another base before it goes in; `carry.carry` makes the checkpoint that it stands for.

    Attributes:
        base: What it was fine-tuned from, as `checkpoint.load` gives it.
        finetuned: The model.
        target: The base that it comes to; the result has its layout, config and vocabulary.
        method: A key of `transport.registry.METHODS`.
        options: The method's own, and `scale`.
    """

    base: Any
    finetuned: Any
    target: Any
    method: str
    options: Mapping[str, Any]

    @property
    def layout(self) -> Any:
        """Names, shapes and dtypes of the result."""
        return self.target.layout

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the result."""
        return self.target.config

    @property
    def path(self) -> Path:
        """Of the model."""
        return self.finetuned.path


@dataclass(frozen=True)
class Planned:
    """The result of an earlier merge of the same file, before it is made: what a later one may be planned from."""

    path: Path
    config: Mapping[str, Any]
    layout: Any
    side_files: Mapping[str, Any]
    network: Any = None

    def stand_ins(self) -> dict[str, np.ndarray]:
        """Name -> an array of the tensor's shape and dtype that takes no memory and holds nothing of it."""
        return {
            name: np.broadcast_to(np.zeros((), info.dtype), info.shape) for name, info in self.layout.tensors.items()
        }


@dataclass(frozen=True)
class MergeJobs:
    """A whole merge, resolved from headers and configs alone.

    Attributes:
        models: Opened checkpoints, by index as `Source.model` has it (`jaxtune.checkpoint.Checkpoint`, stored names;
            of an adapter, lazy leaves in float32 where it changes something); `Transported` and `Planned` are to be
            made first.
        jobs: Output tensors, in the order in which they are written.
        config: config.json of the output.
        side_files: Name -> bytes or the place (`Path`) to copy from (tokenizer, licence, …).
        seed: Of random methods.
        notes: What a reader of the report should know (rounded dtypes, rows filled, files left out).
        recipe: The recipe as it was read, plain values.
    """

    models: tuple[Any, ...]
    jobs: tuple[TensorJob, ...]
    config: Mapping[str, Any]
    side_files: Mapping[str, Any]
    seed: int = 0
    notes: tuple[str, ...] = ()
    recipe: Any = None
