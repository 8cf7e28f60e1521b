"""Fine-tunes that are adapters: opened as a model for the transport, carried as factors to the new base."""

import dataclasses
from typing import Any

import numpy as np

from jaxtune.adapters import Adapter, adapter_task_vector, move_adapter
from jaxtune.checkpoint import Checkpoint
from jaxtune.errors import ConfigError, JaxtuneError
from jaxtune.lazy import is_lazy, read
from jaxtune.loading import network_of
from jaxtune.models import registry
from jaxtune.models.keys import KeyTable
from jaxtune.transport.prepared import Prepared
from jaxtune.tree import apply_task_vector, flatten, is_float, map_leaves, unflatten

# Methods that move a task vector by one element, which moves its factors too.
BY_ELEMENT = ("identity", "permutation", "full")


def key_table_of(model: Checkpoint) -> KeyTable:
    """The table between a checkpoint's tensors and our tree.

    Raises:
        ConfigError: a checkpoint whose tensors are named by our own paths, which no adapter of PEFT speaks of.
    """
    codec = model.layout.codec
    if codec is None:
        raise ConfigError(
            f"{model.path}: an adapter of PEFT names the layers of a family of transformers, and this checkpoint is of "
            f"{model.config.get('model_type')!r}. Give the fine-tune as full weights."
        )
    return codec.table


def open_adapted(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """The base with its adapter merged in, in float32 so that small changes of 16-bit weights are not rounded away.

    Raises:
        ConfigError, TreeMismatchError: the adapter is not one of this base.
    """
    change = adapter_task_vector(adapter, key_table_of(base), base.params)
    wide = map_leaves(
        lambda _, leaf: leaf.astype(_wide_dtype(leaf)) if is_float(leaf) else leaf,
        base.params,
        dtype=lambda _, leaf: _wide_dtype(leaf) if is_float(leaf) else leaf.dtype,
    )
    merged = apply_task_vector(wide, change)
    if not any(map(is_lazy, flatten(base.params).values())):
        merged = unflatten({path: read(leaf) for path, leaf in flatten(merged).items()})
    return dataclasses.replace(base, params=merged, side_files={**base.side_files, **_tokenizer_of(adapter)})


def carry_adapter(
    adapter: Adapter,
    source: Checkpoint,
    target: Checkpoint,
    prepared: Prepared,
    *,
    method: str,
    scale: float,
    base: str,
) -> Adapter:
    """The adapter on the new base, in factors of the same rank.

    Args:
        adapter: Of `source`.
        source, target: Old and new base.
        prepared: What moved its change.
        method: Transport method that made it.
        base: Name of the new base for adapter_config.json.
        scale: Factor of the change.

    Raises:
        ConfigError: the method moves a task vector in another way than by one element, or vocabularies differ.
        SpecError, TreeMismatchError: as `adapters.move_adapter`.
    """
    chosen = prepared.info.get("chosen", method)
    advice = "Ask for full weights (--as full), or for a new adapter of a given rank (--rank R)."
    if chosen not in BY_ELEMENT or prepared.info.get("trust"):
        what = "trust weights" if prepared.info.get("trust") else f"method {chosen!r}"
        raise ConfigError(f"{what}: does more to a change than move it, so its factors cannot be kept. {advice}")
    if "vocabulary" in prepared.info:
        raise ConfigError(f"the vocabularies of the bases differ, and factors are not re-sorted by token yet. {advice}")
    moved: dict[str, Any] = {}
    if prepared.element is not None:
        moved = {"spec": prepared.spec, "element": prepared.element}
        if chosen == "full":
            moved["folded"] = registry.symmetry_of(network_of(source))
    try:
        return move_adapter(
            adapter, key_table_of(source), source=source.params, target=target.params, scale=scale, base=base, **moved
        )
    except JaxtuneError as error:
        raise type(error)(f"{error}\n{advice}") from error


def _wide_dtype(leaf):
    return np.float64 if leaf.dtype == np.float64 else np.float32


def _tokenizer_of(adapter):
    """Tokens that the fine-tune added lie beside the adapter."""
    return {name: place for name, place in adapter.side_files.items() if "token" in name or name.startswith("vocab")}
