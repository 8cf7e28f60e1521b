"""Several models in memory become one: `jaxtune.merge` and `jaxtune.interpolate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.checkpoint import Checkpoint
from jaxtune.errors import unknown_name
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.loading import Model, load, open_models
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS as MERGE_METHODS


def interpolate(first: Model, second: Model, weight: float = 0.5) -> dict[str, Any]:
    """The model at `weight` on the straight line from `first` (0) to `second` (1).

    Raises:
        ConfigError: two checkpoints differ in their architecture.
        TreeMismatchError: the trees differ in a path or a shape.
    """
    models, _ = open_models({"first": first, "second": second}, None)
    return interpolate_linear(models["first"], models["second"], weight)


def merge(
    models: Sequence[Model],
    *,
    base: Model | None = None,
    method: str = "linear",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """One model of several, in memory; `jaxtune.merge_recipe` does it from files to files, at any size.

    Args:
        models: Two or more trees of the same paths and shapes; checkpoints, or their paths.
        base: What task vectors are counted from, for methods that need it.
        method: A key of `jaxtune.merge.registry.METHODS`.
        seed: Of random methods.
        **options: The method's own; per-model ones as one value, or a sequence with one a model. `preset` names a peer.

    Returns:
        The tree of the base (without one: of the first model), rounded once to its dtypes. Of checkpoints in the names
        of another library the tensors are merged as they are stored there, so that rows are rows of those files, and
        the result is our tree of them: `jaxtune.save(path, params, like=base)` writes it.

    Raises:
        ConfigError: two checkpoints differ in their architecture; or as `merge.arrays.merge_trees`.
        JaxtuneError: the trees do not fit, or the method or an option is unknown.
    """
    if method not in MERGE_METHODS:
        raise unknown_name("merge method", method, MERGE_METHODS)
    named = {f"model {n}": model for n, model in enumerate(models)} | ({} if base is None else {"base": base})
    opened = {name: load(model) if isinstance(model, str | Path) else model for name, model in named.items()}
    trees, _ = open_models(opened, None)
    codecs = [model.layout.codec if isinstance(model, Checkpoint) else None for model in opened.values()]
    like = next(iter(opened.values())) if base is None else opened["base"]
    is_stored = all(codec is not None for codec in codecs)
    if is_stored:
        trees = {
            name: {tensor: codec.encoder(trees[name])(tensor) for tensor in opened[name].layout.tensors}
            for name, codec in zip(opened, codecs, strict=True)
        }
    tree = trees.pop("base", None)
    how = {"seed": seed, "input_axis": -1 if is_stored else 0, **options}
    merged = merge_trees(MERGE_METHODS[method], list(trees.values()), tree, **how)
    return like.layout.codec.table.decode(merged) if is_stored else merged
