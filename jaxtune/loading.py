"""Checkpoints and the networks in them: stored tensors become the tree of a family, several become comparable."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import checkpoint
from jaxtune.checkpoint import Checkpoint
from jaxtune.checkpoint.vocabulary import read_tokens
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.lazy import defer
from jaxtune.models import registry
from jaxtune.models.keys import Codec
from jaxtune.transport.vocabulary import map_rows, take_rows
from jaxtune.tree import check_finite, check_same, flatten, map_leaves, unflatten
from jaxtune.types import Params

# A checkpoint, the path of one, or a bare tree.
Model = Checkpoint | Params | str | Path

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
    return understand(stored, lazy=stored.layout.num_bytes > LAZY_BYTES if lazy is None else lazy)


def understand(stored: Checkpoint, *, lazy: bool = False) -> Checkpoint:
    """A checkpoint as `checkpoint.load` gives it, its tensors as the tree of the family that its config names.

    Raises:
        ConfigError, TreeMismatchError: as `load`.
    """
    tensors = flatten(stored.params)
    if not registry.is_stored_family(stored.config):
        if not lazy or stored.format == "orbax":  # whose arrays are read already
            return stored
        return dataclasses.replace(stored, params=map_leaves(lambda _, leaf: defer(leaf), stored.params))
    try:
        network, table = registry.read_stored(stored.config, tensors)
        params = table.decode(tensors, lazy=lazy)
    except (ConfigError, TreeMismatchError) as error:
        raise type(error)(f"{stored.path}: {error}") from error
    carried = {name: tensor for name, tensor in tensors.items() if table.is_ignored(name)}
    layout = dataclasses.replace(stored.layout, codec=Codec(table, carried, flatten(params)))
    return dataclasses.replace(stored, params=params, layout=layout, network=network)


def network_of(model: Checkpoint) -> Any:
    """The native config of a checkpoint's network.

    Raises:
        ConfigError: its config names no known family, or makes no sense.
    """
    return registry.config_from_dict(model.config) if model.network is None else model.network


def open_models(
    models: Mapping[str, Model],
    config: Any,
    *,
    roles_with_own_words: Collection[str] = (),
    roles_with_own_widths: Collection[str] = (),
) -> tuple[dict[str, Params], Any]:
    """Trees of models that belong together, and their one config.

    Args:
        models: Name used in messages -> model. The last one's config is given back.
        config: Architecture of bare trees, a model config or its dict; None for checkpoints.
        roles_with_own_words: Checkpoints whose vocabulary may differ from that of the last.
        roles_with_own_widths: Models that may be wider or narrower than the last; of one width among themselves.

    Raises:
        ConfigError: the architecture is unknown, or two differ in it.
        TreeMismatchError: the trees differ in a path or a shape.
        NonFiniteError: a leaf holds NaN or Inf.
    """
    models = {name: load(model) if isinstance(model, str | Path) else model for name, model in models.items()}
    trees = {name: model.params if isinstance(model, Checkpoint) else model for name, model in models.items()}
    checkpoints = {name: model for name, model in models.items() if isinstance(model, Checkpoint)}
    if isinstance(config, Mapping):
        config = registry.config_from_dict(config)
    own_words = [name for name in roles_with_own_words if name in checkpoints]
    if checkpoints:
        own_widths = [name for name in roles_with_own_widths if name in checkpoints]
        own = check_same_architecture(checkpoints, roles_with_own_words=own_words, roles_with_own_widths=own_widths)
        if config is not None and config != own:
            raise ConfigError(f"config= says {config}, the checkpoints say {own}. Leave config= out.")
        config = own
    axes = registry.vocabulary_axes(config) if own_words else {}
    comparable = {name: _without(tree, axes) for name, tree in trees.items()} if axes else trees
    if roles_with_own_widths:
        check_same({name: tree for name, tree in comparable.items() if name in roles_with_own_widths})
        last = flatten(list(comparable.values())[-1])
        # Where both have a leaf its shape does not count: what is left are paths, and models of the last one's width.
        comparable = {
            name: map_leaves(lambda path, leaf: last.get(path, leaf), tree) if name in roles_with_own_widths else tree
            for name, tree in comparable.items()
        }
    check_same(comparable)
    for name, tree in trees.items():
        check_finite(name, tree)
    return trees, config


def other_widths(models: Mapping[str, Model]) -> dict[str, list[str]]:
    """Checkpoints whose networks differ from the last one's in widths and at most in the vocabulary beside.

    Returns:
        Name -> a line for every width with both values; nothing where a model is a bare tree.

    Raises:
        ConfigError: a config is of no known family.
    """
    checkpoints = {name: model for name, model in models.items() if isinstance(model, Checkpoint)}
    if len(checkpoints) < len(models):
        return {}
    *others, (last, config) = ((name, network_of(model)) for name, model in checkpoints.items())
    found = {}
    for name, other in others:
        fields = _differing(*map(registry.without_vocabulary, (other, config)))
        if fields and all(registry.is_width(*field) for field in fields):
            found[name] = [_line(name, last, *field) for field in fields]
    return found


def check_same_architecture(
    models: Mapping[str, Checkpoint],
    *,
    roles_with_own_words: Collection[str] = (),
    roles_with_own_widths: Collection[str] = (),
) -> Any:
    """The one model config of all checkpoints: that of the last.

    Args:
        models: Name used in the message -> checkpoint.
        roles_with_own_words: Those whose size of vocabulary may be another.
        roles_with_own_widths: Those that may be wider or narrower.

    Raises:
        ConfigError: a config is of no known family, or two differ; lists every field with both values.
    """
    *others, (last, config) = ((name, network_of(model)) for name, model in models.items())
    for name, other in others:
        both = (other, config)
        if name in roles_with_own_words:
            both = tuple(map(registry.without_vocabulary, both))
        lines = [
            _line(name, last, *field)
            for field in _differing(*both)
            if not (name in roles_with_own_widths and registry.is_width(*field))
        ]
        if lines:
            raise ConfigError(
                f"{name} ({models[name].path}) and {last} ({models[last].path}) are different architectures:\n"
                + "\n".join(lines)
                + "\nWeights can only be carried between models of one architecture."
            )
    return config


def share_vocabulary(
    models: Mapping[str, Model], trees: Mapping[str, Params], config: Any
) -> tuple[dict[str, Params], dict[str, Any]]:
    """Networks over the vocabulary of the last one, the target.

    Args:
        models: Role -> checkpoint or bare tree; bare trees are left as they are.
        trees: Their parameters.
        config: Of the target.

    Returns:
        Role -> parameters with the target's rows; a row that is not known to all is zero in all of them, also in the
        target, which is to be matched against and not written. And what to report; nothing where no row moved.
    """
    *movers, last = models
    axes = registry.vocabulary_axes(config) if all(isinstance(m, Checkpoint) for m in models.values()) else {}
    if not axes:
        return dict(trees), {}
    tokens = {role: read_tokens(model.side_files) for role, model in models.items()}
    sizes = {role: registry.vocabulary_size(network_of(model)) for role, model in models.items()}
    maps = {role: map_rows(tokens[role], sizes[role], tokens[last], sizes[last]) for role in movers}
    if all(one.is_identity for one in maps.values()):
        return dict(trees), {}
    # A row that only one of them has says nothing about how the others differ.
    shared = np.logical_and.reduce([one.rows >= 0 for one in maps.values()])
    rows = {role: one.rows for role, one in maps.items()} | {last: np.arange(len(shared))}
    words = {
        "vocabulary": {
            "matched": {role: one.statement for role, one in maps.items()},
            "num_shared_rows": int(shared.sum()),
            "num_rows_left_as_they_are": int((~shared).sum()),
            "num_rows_lost": {role: one.num_lost for role, one in maps.items()},
        }
    }
    return {role: take_rows(trees[role], axes, np.where(shared, rows[role], -1)) for role in models}, words


def _line(name, last, field, theirs, ours):
    return f"  {field}: {name} {theirs!r}, {last} {ours!r}"


def _differing(one, other):
    """[(field, value, value)] of two configs; of two families that alone."""
    theirs, ours = (_flat_config(registry.config_to_dict(config)) for config in (one, other))
    fields = ["model_type"] if theirs["model_type"] != ours["model_type"] else sorted(ours.keys() | theirs.keys())
    return [(field, theirs.get(field), ours.get(field)) for field in fields if theirs.get(field) != ours.get(field)]


def _without(tree, axes):
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if path not in axes})


def _flat_config(values, prefix=""):
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat_config(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
