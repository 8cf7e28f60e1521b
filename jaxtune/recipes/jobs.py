"""What a resolved recipe says of every tensor of the output: from which tensors it is made, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Source:
    """A stored tensor that goes into one of the output.

    Attributes:
        model: Index into `MergeJobs.models`.
        name: Of the tensor there.
        rows: Row of this tensor for each row of the output, -1 for none (then `filler` says what stands there);
            None where rows are the same.
        filler: Values of rows that no row of this tensor gives: float32[num such rows, ...], in their order.
    """

    model: int
    name: str
    rows: np.ndarray | None = None
    filler: np.ndarray | None = None


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output.

    Attributes:
        name: In the output.
        shape: In the output.
        dtype: Of the arithmetic's inputs: every source is rounded to it first, as a recipe's `dtype` says; None where
            sources are taken as they are stored.
        out_dtype: As it is stored.
        method: A key of `merge.registry.METHODS`; "copy" where one source is taken byte for byte.
        sources: One a model that goes in, in the order of the recipe; the base is not among them.
        base: Its source; None where the method has none.
        options: Option -> value; of per-model options a tuple with one a source.
        post: Post-steps (name, options), in their order.
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


@dataclass(frozen=True)
class MergeJobs:
    """A whole merge, resolved from headers and configs alone.

    Attributes:
        models: Opened checkpoints, by index as `Source.model` has it (`jaxtune.checkpoint.Checkpoint`, stored names).
        jobs: Output tensors, in the order in which they are written.
        config: config.json of the output.
        side_files: Name -> bytes or the place to copy from (tokenizer, licence, …).
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
