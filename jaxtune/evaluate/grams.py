"""Grams of a network's matrices in a file that a merge recipe's `data:` reads."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxtune import checkpoint
from jaxtune.checkpoint import Checkpoint
from jaxtune.moments import Gram
from jaxtune.tree import flatten, is_float, unflatten


def save_grams(path: str | Path, grams: Mapping[str, Gram], like: Checkpoint, *, overwrite: bool = False) -> Path:
    """Writes Grams as a recipe's `data:` reads them: safetensors under the names of the model's stored tensors.

    Args:
        path: The file or folder to create.
        grams: From `moments.gather_grams`, of the model.
        like: The model as it was loaded: its names, and the order of the axes of its tensors.
        overwrite: Whether a former output at `path` may be replaced.

    Raises:
        OutputError: as `checkpoint.save`.
    """
    tensors = unflatten({name: gram.astype(np.float32) for name, gram in stored_grams(grams, like).items()})
    return checkpoint.save(path, tensors, config={}, format="safetensors", overwrite=overwrite)


def stored_grams(grams: Mapping[str, Gram], like: Checkpoint) -> dict[str, np.ndarray]:
    """{name of a stored matrix: its Gram, inputs in the order that the file has}, float64.

    Where several of our matrices are one stored tensor (queries, keys and values), they read the same. Left out are
    tensors of other libraries with more than two axes, or with inputs along the first (GPT-2's): merge methods read
    neither as a matrix of that side.
    """
    leaves, codec = flatten(like.params), like.layout.codec
    if codec is None:
        own = {path: gram for path, gram in grams.items() if path in leaves and path.endswith("/kernel")}
        return {path: gram.gram for path, gram in own.items() if gram.in_axes == tuple(range(len(gram.in_axes)))}
    found = {}
    for row in codec.table.rows:
        ours = [grams.get(leaf) for leaf in row.leaves]
        if not isinstance(row.stored, str) or any(gram is None for gram in ours):
            continue
        info = like.layout.tensors[row.stored]
        if len(info.shape) != 2 or not is_float(info):
            continue
        # Which input stands where in the file: numbers in the place of the weights say.
        numbers = {leaf: _number_inputs(leaves[leaf].shape, gram) for leaf, gram in zip(row.leaves, ours, strict=True)}
        numbers = row.encode(numbers)[row.stored]
        order = numbers[0].astype(int)
        reads_along_rows = len(order) == len(ours[0].gram) and (numbers == numbers[0]).all()
        if reads_along_rows and len({gram.count for gram in ours}) == 1:
            found[row.stored] = ours[0].gram[np.ix_(order, order)]
    return found


def _number_inputs(shape, gram):
    """A leaf that holds, instead of each weight, the number of the input that the weight is for."""
    sizes = [size if axis in gram.in_axes else 1 for axis, size in enumerate(shape)]
    return np.broadcast_to(np.arange(len(gram.gram), dtype=np.float64).reshape(sizes), shape)
