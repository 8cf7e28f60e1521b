"""Opens the models of a recipe: configs and headers; weights stay on disk."""

import dataclasses
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune import checkpoint
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.recipes.architecture import DEFAULT, Architecture, find_architecture
from jaxtune.recipes.chain import made_name
from jaxtune.recipes.jobs import Planned, Transported
from jaxtune.recipes.nodes import Node
from jaxtune.recipes.references import ModelReference, find_folder
from jaxtune.recipes.vocabularies import HEAD, find_table, find_vocabulary

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
        if _is_adapter(stored):
            raise node.error(f"{str(reference)!r} is an adapter. Name its base too: BASE+{reference.path}.")
        stored = checkpoint.load(stored)
    if reference.architecture is not None:
        stored = dataclasses.replace(stored, config={**stored.config, "architectures": [reference.architecture]})
    if reference.lora is not None:
        place = find_folder(reference.lora, reference.lora_revision, node, folder)
        if not _is_adapter(place):
            raise node.error(f"{reference.lora!r} is no adapter: there is no adapter_config.json in {place}.")
        from jaxtune.recipes.adapted import adapt, plan_adapted  # with it come our networks, and JAX

        stored = plan_adapted(stored, place) if isinstance(stored, Planned) else adapt(stored, place)
    return describe(str(reference), stored)


def describe(label: str, stored: Any) -> Opened:
    """What the headers and the config of a checkpoint tell."""
    tensors = stored.layout.tensors
    config = stored.config
    table, architecture = None, find_architecture(config, tensors)
    if not _says_all(architecture):
        table = _find_table(config, tensors)
        architecture = find_architecture(config, tensors, table)
    ignored = re.compile("|".join(f"(?:{one})" for one in (*(table.ignored if table else ()), COMPUTED)))
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
        side_files=stored.side_files,
    )


def transported(opened: Opened, base: Opened, target: Opened, method: str, options: Mapping[str, Any]) -> Opened:
    """A model as it will be once it is carried to the target: its tensors are the target's."""
    model = Transported(base.model, opened.model, target.model, method, options)
    return dataclasses.replace(target, label=f"{opened.label} (carried over)", model=model)


def _is_adapter(place):
    return (Path(place) / "adapter_config.json").is_file()


def _says_all(architecture) -> bool:
    """Whether names and config alone tell where everything belongs: one list of layers, of a length the config has."""
    return list(architecture.stacks) == [DEFAULT] and getattr(architecture.stacks[DEFAULT], "field", None) is not None


def _find_table(config, tensors):
    """The key table of a family that we know; with it come our networks, and JAX."""
    from jaxtune.models import registry

    if not registry.is_stored_family(config):
        return None
    try:
        _, table = registry.read_stored(config, tensors)
        table.check(tensors)
    except (ConfigError, TreeMismatchError):  # a relative of the family; its names still tell
        return None
    return table


def _guess_ties(config, tensors) -> dict[str, str]:
    """Of an unknown family: the head repeats the table where the config says so, or no head is stored."""
    said = config.get("tie_word_embeddings")
    table = find_table(tensors)
    head = next((name for name in tensors if HEAD.search(name)), None)
    if table is None or (said is False) or (head is not None and not said):
        return {}
    return {head or "lm_head.weight": table}
