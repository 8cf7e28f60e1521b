"""A checkpoint and the network in it: stored tensors become the tree of a family that we know."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune import checkpoint
from jaxtune.checkpoint import Checkpoint
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.lazy import defer
from jaxtune.models import registry
from jaxtune.models.keys import Codec
from jaxtune.tree import flatten, map_leaves

# Above this much stored, leaves are lazy: read from the file when they are used, and not kept.
LAZY_BYTES = 1 << 30


def load(path: str | Path, *, config: Mapping[str, Any] | None = None, lazy: bool | None = None) -> Checkpoint:
    """Loads a checkpoint of any format and any family.

    Args:
        path: A folder with config.json and weights, one file or many with an index; a single .safetensors; an .npz; an
            orbax folder: see `jaxtune.checkpoint.load`.
        config: For a checkpoint that has none. `{}` reads the tensors of a model of unknown family.
        lazy: Whether leaves are `jaxtune.lazy.LazyLeaf`, each made when it is read; None: from 1 GiB on.

    Returns:
        A `Checkpoint` whose `params` is our tree of the family that its config names: paths as in `symmetry_of`, heads
        as axes of their own. `jaxtune.save(path, params, like=it)` writes it back in its own names and layout. The
        tensors of an unknown family keep their stored names.

    Raises:
        CheckpointError: nothing there, nothing recognised, damaged, hostile, or without config.
        ConfigError: a known family, with a field that changes the function and is not supported.
        TreeMismatchError: a known family, and tensors that are not its.
    """
    stored = checkpoint.load(path, config=config)
    if lazy is None:
        lazy = stored.layout.num_bytes > LAZY_BYTES
    if not registry.is_stored_family(stored.config):
        if not lazy or stored.format == "orbax":  # whose arrays are read already
            return stored
        return dataclasses.replace(stored, params=map_leaves(lambda _, leaf: defer(leaf), stored.params))
    tensors = flatten(stored.params)
    try:
        _, table = registry.read_stored(stored.config, tensors)
        params = table.decode(tensors, lazy=lazy)
    except (ConfigError, TreeMismatchError) as error:
        raise type(error)(f"{path}: {error}") from error
    carried = {name: tensor for name, tensor in tensors.items() if table.is_ignored(name)}
    layout = dataclasses.replace(stored.layout, codec=Codec(table, carried, flatten(params)))
    return dataclasses.replace(stored, params=params, layout=layout)
