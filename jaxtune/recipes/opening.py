"""Opens the models of a recipe: configs and headers; weights stay on disk."""

import dataclasses
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import checkpoint
from jaxtune.adapters import is_adapter, read_adapter
from jaxtune.adapters.binding import bind
from jaxtune.adapters.dense import multiply_out
from jaxtune.checkpoint import Checkpoint
from jaxtune.errors import ConfigError, JaxtuneError, TreeMismatchError
from jaxtune.lazy import LazyLeaf
from jaxtune.loading import understand
from jaxtune.models import registry
from jaxtune.recipes.architecture import Architecture, find_architecture
from jaxtune.recipes.chain import made_name
from jaxtune.recipes.jobs import Planned, Transported
from jaxtune.recipes.nodes import Node
from jaxtune.recipes.references import ModelReference, find_folder
from jaxtune.recipes.vocabularies import HEAD, find_table, find_vocabulary
from jaxtune.tree import flatten, unflatten

# Tensors that a network computes by itself and older files hold: nothing depends on them.
COMPUTED = r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn\.(bias|masked_bias))"


@dataclass(frozen=True)
class Opened:
    """A model of a recipe, as far as its headers and config tell.

    Attributes:
        label: What messages call it.
        model: What `MergeJobs.models` holds: `Checkpoint`, `Transported` or `Planned`.
        tensors: Name -> stored dtype and shape.
        config: Its config.json.
        architecture: Places of its tensors.
        ties: Name of a tensor that repeats another, stored or not -> that other.
        computed: Names of tensors that the network makes itself.
        rows: Name of every tensor with a row a token -> the axis that counts tokens.
        network: Our config of it; None where we do not know the family.
        side_files: Name -> where to read it.
    """

    label: str
    model: Any
    tensors: Mapping[str, Any]
    config: Mapping[str, Any]
    architecture: Architecture
    ties: Mapping[str, str]
    computed: Set[str]
    rows: Mapping[str, int]
    network: Any
    side_files: Mapping[str, Any]

    @property
    def kind(self) -> str | None:
        """What network it is, in its own words."""
        return self.config.get("model_type") or self.config.get("architecture")


def open_reference(
    reference: ModelReference, node: Node, folder: Path | None = None, made: Mapping[str, Any] | None = None
) -> Opened:
    """Opens one model of a recipe.

    Args:
        reference: Which.
        node: Where the recipe names it.
        folder: Of the recipe's file.
        made: Name of an earlier merge of the same file -> its folder, or `Planned`.

    Raises:
        RecipeError: it is nowhere, or an adapter without its base.
        CheckpointError, ConfigError, TreeMismatchError: it is damaged, or an adapter does not fit its base.
    """
    name = made_name(reference.path, made or {})
    stored = made[name] if name is not None else find_folder(reference.path, reference.revision, node, folder)
    if not isinstance(stored, Planned):
        if is_adapter(stored):
            raise node.error(f"{str(reference)!r} is an adapter. Name its base too: BASE+{reference.path}.")
        stored = checkpoint.load(stored)
    if reference.architecture is not None:
        stored = dataclasses.replace(stored, config={**stored.config, "architectures": [reference.architecture]})
    if reference.lora is not None:
        if isinstance(stored, Planned):
            raise node.error("an adapter on top of an earlier merge of this file: make that merge first.")
        place = find_folder(reference.lora, reference.lora_revision, node, folder)
        if not is_adapter(place):
            raise node.error(f"{reference.lora!r} is no adapter: there is no adapter_config.json in {place}.")
        stored = adapt(stored, place)
    return describe(str(reference), stored)


def describe(label: str, stored: Any) -> Opened:
    """What the headers and the config of a checkpoint tell."""
    tensors = stored.layout.tensors
    config = stored.config
    network = table = None
    if registry.is_stored_family(config):
        try:
            network, table = registry.read_stored(config, tensors)
            table.check(tensors)
        except (ConfigError, TreeMismatchError):  # a relative of the family; its names still tell
            network = table = None
    ignored = re.compile("|".join(f"(?:{one})" for one in (*(table.ignored if table else ()), COMPUTED)))
    architecture = find_architecture(config, tensors, table)
    outside = {name: tensors[name] for name, place in architecture.places.items() if place.layer is None}
    ties = dict(table.ties) if table else _guess_ties(config, outside)
    return Opened(
        label=label,
        model=stored,
        tensors=tensors,
        config=config,
        architecture=architecture,
        ties={name: original for name, original in ties.items() if original in tensors},
        computed={name for name in tensors if ignored.fullmatch(name)},
        rows=find_vocabulary(outside),
        network=network,
        side_files=stored.side_files,
    )


def transported(opened: Opened, base: Opened, target: Opened, method: str, options: Mapping[str, Any]) -> Opened:
    """A model as it will be once it is carried to the target: its tensors are the target's."""
    model = Transported(base.model, opened.model, target.model, method, options)
    return dataclasses.replace(target, label=f"{opened.label} (carried over)", model=model)


def adapt(stored: Checkpoint, folder: Path) -> Checkpoint:
    """A checkpoint with an adapter merged into its stored tensors, each made when it is read.

    In float32, or float64, so that small changes of 16-bit weights are not rounded away; `layout` keeps the stored
    dtypes. Tensors that the adapter leaves alone stay the mapped ones.

    Raises:
        ConfigError, TreeMismatchError: the adapter is not one of this base.
    """
    adapter = read_adapter(folder)
    understood = understand(stored, lazy=True)
    if understood.layout.codec is None:
        raise ConfigError(
            f"{stored.path}: an adapter names layers of a family that we know, and this checkpoint is of "
            f"{stored.config.get('model_type')!r}. Merge it with the library that wrote it, and name the folder."
        )
    try:
        matrices, wholes = bind(adapter, understood.layout.codec.table, understood.params)
    except JaxtuneError as error:
        raise type(error)(f"{folder}: {error}") from error
    tensors = flatten(stored.params)
    wholes = {whole.name: adapter.tensors[whole.tensor] for whole in wholes}
    changed: dict[str, list] = {name: [] for name in wholes}
    for matrix in matrices:
        changed.setdefault(matrix.name, []).append(matrix)
    for name, own in changed.items():
        start = wholes.get(name, tensors[name])
        dtype = np.float64 if np.float64 in (start.dtype, tensors[name].dtype) else np.float32

        def make(start=start, own=own, dtype=dtype):
            return sum((multiply_out(adapter, matrix, dtype) for matrix in own), np.asarray(start).astype(dtype))

        tensors[name] = LazyLeaf(tensors[name].shape, dtype, make)
    tokens = {name: place for name, place in adapter.side_files.items() if "token" in name or name.startswith("vocab")}
    return dataclasses.replace(stored, params=unflatten(tensors), side_files={**stored.side_files, **tokens})


def _guess_ties(config, tensors) -> dict[str, str]:
    """Of an unknown family: the head repeats the table where the config says so, or no head is stored."""
    said = config.get("tie_word_embeddings")
    table = find_table(tensors)
    head = next((name for name in tensors if HEAD.search(name)), None)
    if table is None or (said is False) or (head is not None and not said):
        return {}
    return {head or "lm_head.weight": table}
