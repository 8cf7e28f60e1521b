"""Prunes single layers of two models before they are interpolated: the repair of stragglers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.interpolate.stragglers import first_component, layers_of
from jaxtune.tree import check_same, flatten, unflatten
from jaxtune.types import Params

SOURCES = ("weights", "difference")


def prune_layers(
    first: Params,
    second: Params,
    layers: Sequence[str],
    *,
    sparsity: float = 0.3,
    source: str = "weights",
    layer_of: Callable[[str], str] = first_component,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two models with some layers pruned by magnitude, before they are interpolated.

    Args:
        first, second: The models.
        layers: Names, as `find_stragglers` gives them.
        sparsity: Share of the entries of such a layer's matrices that goes, the smallest of the layer; 0.1 to 0.5 in
            use.
        source: "weights": in each model the smallest weights become zero. "difference": the smallest entries of
            `second - first` do, so that `second` has `first`'s there and `first` stays as it is.
        layer_of: Path -> name of its layer.

    Raises:
        ConfigError: a share outside [0, 1), or a layer without matrices.
        UnknownNameError: no such layer or source.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is {sparsity}; it must be at least 0 and below 1.")
    if source not in SOURCES:
        raise unknown_name("source of pruning", source, SOURCES)
    check_same({"first": first, "second": second})
    known, flats = layers_of(first, layer_of), (flatten(first), flatten(second))
    pruned = tuple(dict(flat) for flat in flats)
    for layer in layers:
        if layer not in known:
            raise unknown_name("layer", layer, known)
        paths = [path for path in known[layer] if flats[0][path].ndim >= 2]
        if not paths:
            raise ConfigError(f"layer {layer} has no matrix whose entries could be pruned.")
        ours, theirs = ({path: np.asarray(flat[path], np.float32) for path in paths} for flat in flats)
        if source == "weights":
            masks = [_largest(side, sparsity) for side in (ours, theirs)]
        else:
            masks = [None, _largest({path: theirs[path] - ours[path] for path in paths}, sparsity)]
        for path in paths:
            for flat, mask in zip(pruned, masks, strict=True):
                if mask is not None:
                    rest = np.zeros_like(ours[path]) if source == "weights" else ours[path]
                    kept = np.where(mask[path], np.asarray(flat[path], np.float32), rest)
                    flat[path] = kept.astype(flat[path].dtype)
    return unflatten(pruned[0]), unflatten(pruned[1])


def _largest(leaves: Mapping[str, np.ndarray], sparsity: float) -> dict[str, np.ndarray]:
    """{path: bool}: all but the share of smallest magnitude of the leaves together, of equal ones the last kept."""
    flat = np.abs(np.concatenate([leaf.ravel() for leaf in leaves.values()]))
    is_kept = np.ones(flat.size, bool)
    is_kept[np.argsort(flat, kind="stable")[: int(sparsity * flat.size + 1e-9)]] = False
    parts = np.split(is_kept, np.cumsum([leaf.size for leaf in leaves.values()])[:-1])
    return {path: part.reshape(leaves[path].shape) for path, part in zip(leaves, parts, strict=True)}
