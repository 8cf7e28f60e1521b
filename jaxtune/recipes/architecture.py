"""Where each stored tensor belongs: which module, which layer, before or behind the layers; linear in their number.

A module is one numbered list of layers and what belongs to it. Our key tables say which lists are layers, where they
know the family; else the names do: the first number of a name counts layers where its list is as long as config.json
says, or where nothing says better. One list makes one module, "default", as in mergekit.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtune.models.keys import KeyTable

DEFAULT = "default"
NUMBER = re.compile(r"(?:^|[./]|block_)(\d+)[./]")
BLOCK = re.compile(r"(?:(?P<module>[^/]+)/)?block_\d+/")
# What stands before the first layer; of slices it comes from the first one. Everything else comes from the last.
FIRST = re.compile(
    r"(^|[./])(embed(?!_out)\w*|wte|wpe|shared|tok_embeddings|\w+_embeddings?|patch\w*|pos_embed|\w+_tokens?|"
    r"pre_lay\w*|ln_pre|norm_pre|conv1|conv_stem|stem|project_in)([./]|$)"
)
SHARED = "relative_attention_bias"
FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "layers")
SIDES = {  # part of a name -> where config.json speaks of it, and fields beside FIELDS
    "vision": ("vision", "vis"),
    "text": ("text", "language"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}


@dataclass(frozen=True)
class Stack:
    """A numbered list of layers.

    Attributes:
        prefix: What stands before the number: "model.layers.".
        num_layers: How many there are.
        field: Where config.json counts them, keys apart by ".": "vision_config.num_hidden_layers"; None: nowhere.
    """

    prefix: str
    num_layers: int
    field: str | None


class Place(NamedTuple):
    """Where one tensor belongs.

    Attributes:
        layer: Its layer; None outside of the layers.
        part: What stands behind the number: "self_attn.q_proj.weight"; outside of the layers the whole name.
        is_first: Whether it stands before the first layer.
    """

    module: str
    layer: int | None
    part: str
    is_first: bool = False


@dataclass(frozen=True)
class Architecture:
    """Modules of a checkpoint, and the place of each of its tensors."""

    stacks: Mapping[str, Stack | None]
    places: Mapping[str, Place]

    def name_of(self, place: Place, layer: int | None = None) -> str:
        """The name of a tensor, in another layer where one is given."""
        if place.layer is None:
            return place.part
        stack = self.stacks[place.module]
        number = place.layer if layer is None else layer
        # The character behind the number is part of `part`, so that "block_3/attn" and "h.3.attn" come back.
        return f"{stack.prefix}{number}{place.part}"


def find_architecture(config: Mapping[str, Any], names: Iterable[str], table: KeyTable | None = None) -> Architecture:
    """The modules of a checkpoint.

    Args:
        config: Its config.json.
        names: Of its stored tensors.
        table: Of its family, where it is known.
    """
    names = tuple(names)
    prefixes = _prefixes_of_table(table) if table is not None else {}
    counts = _count(names)
    prefixes = {prefix: module for prefix, module in prefixes.items() if prefix in counts}
    if not prefixes:
        prefixes = _choose_prefixes(config, counts)
    if len(prefixes) == 1:
        prefixes = dict.fromkeys(prefixes, DEFAULT)
    stacks: dict[str, Stack | None] = {
        module: Stack(prefix, counts[prefix], find_field(config, counts[prefix], prefix, module))
        for prefix, module in prefixes.items()
    }
    roots = _find_roots({module: stack.prefix for module, stack in stacks.items()})
    rest = _module_of_rest(list(stacks))
    places = dict(_find_places(names, tuple(prefixes.items()), tuple(roots), rest, "vision" in stacks))
    _take_out_shared(places, stacks)
    if not stacks:
        stacks[DEFAULT] = None
    return Architecture(stacks, places)


def _take_out_shared(places, stacks) -> None:
    """Distances that the first layer holds for all of its stack (T5): they stay where they are, as tables do."""
    found = [name for name, place in places.items() if place.layer is not None and SHARED in place.part]
    of_stack = {module: [name for name in found if places[name].module == module] for module in stacks}
    for module, names in of_stack.items():
        if [places[name].layer for name in names] == [0]:
            places[names[0]] = Place(module, None, names[0], is_first=True)


def find_field(config: Mapping[str, Any], count: int, prefix: str, module: str) -> str | None:
    """The field of config.json that counts the layers of a stack."""
    side = next((side for side in SIDES if side in (module, *re.split(r"[._/]", prefix))), None)
    if side is None and any(word in prefix for word in SIDES["vision"]):
        side = "vision"
    scopes: list[tuple[str, Mapping[str, Any]]] = []
    for word in SIDES.get(side, ()) if side else ("text", "language"):
        scopes += [
            (f"{key}.", value) for key, value in config.items() if key.startswith(word) and isinstance(value, Mapping)
        ]
    own = [f"{side}_layers", f"num_{side}_layers"] if side in ("encoder", "decoder") else []
    for start, scope in [*scopes, ("", config)]:
        for field in (*own, *FIELDS):
            if scope.get(field) == count and not isinstance(scope.get(field), bool):
                return start + field
    return None


def get_field(config: Mapping[str, Any], field: str) -> Any:
    """A field, keys apart by "."; None where it is absent."""
    for key in field.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def with_field(config: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A config with one field set."""
    key, _, rest = field.partition(".")
    return {**config, key: with_field(config.get(key) or {}, rest, value) if rest else value}


# The models of a merge mostly have the same names: of 50,000 tensors the time that the others take is felt.
@functools.lru_cache(maxsize=1)
def _find_numbers(names):
    """Name -> (what stands before its first number, the number, what comes behind); None without one."""
    matches = ((name, NUMBER.search(name)) for name in names)
    return {
        name: (name[: match.start(1)], int(match[1]), name[match.end(1) :]) if match else None
        for name, match in matches
    }


@functools.lru_cache(maxsize=1)
def _find_places(names, prefixes, roots, rest, has_vision) -> dict[str, Place]:
    """The place of every tensor."""
    module_of, places = dict(prefixes), {}
    for name, found in _find_numbers(names).items():
        module = module_of.get(found[0]) if found else None
        if module is not None:
            places[name] = Place(module, *found[1:])
            continue
        module = next((module for root, module in roots if name.startswith(root)), rest)
        if name.startswith("vis") and has_vision:  # projections out of a tower, beside it
            module = "vision"
        places[name] = Place(module, None, name, FIRST.search(name) is not None)
    return places


def _count(names) -> dict[str, int]:
    """Prefix of the first number -> how many layers, where they count from 0 without a gap."""
    found: dict[str, set[int]] = {}
    for one in _find_numbers(names).values():
        if one:
            found.setdefault(one[0], set()).add(one[1])
    return {prefix: len(numbers) for prefix, numbers in found.items() if len(numbers) == max(numbers) + 1}


def _prefixes_of_table(table) -> dict[str, str]:
    """Prefix of layers -> module, of a family that we know: its leaves lie under "block_3/"."""
    prefixes: dict[str, str] = {}
    for row in table.rows:
        block, number = BLOCK.match(row.leaves[0]), NUMBER.search(row.names[0])
        if block and number:
            prefixes.setdefault(row.names[0][: number.start(1)], block["module"] or DEFAULT)
    return prefixes if len(set(prefixes.values())) == len(prefixes) else {}


def _choose_prefixes(config, counts) -> dict[str, str]:
    """The same from names alone; modules are called as mergekit calls those that it infers."""
    modules = {prefix: _module_name(prefix) for prefix in counts}
    said = {prefix: module for prefix, module in modules.items() if find_field(config, counts[prefix], prefix, module)}
    return said or modules


def _module_name(prefix):
    words = re.split(r"[._/]", prefix)
    return next((side for side in SIDES if side in words), prefix.rstrip("._/"))


def _find_roots(prefixes) -> list[tuple[str, str]]:
    """(first words that only one module's layers have, module), the longest first."""
    if len(prefixes) < 2:
        return []
    roots = []
    for module, prefix in prefixes.items():
        words = re.findall(r"[^./]*[./]", prefix)
        others = [other for one, other in prefixes.items() if one != module]
        for stop in range(1, len(words) + 1):
            root = "".join(words[:stop])
            if not any(other.startswith(root) for other in others):
                roots.append((root, module))
                break
    return sorted(roots, key=lambda pair: -len(pair[0]))


def _module_of_rest(modules) -> str:
    """The module that shared tensors go with: the one whose readings count in the end."""
    return next((module for module in ("decoder", "text") if module in modules), modules[0] if modules else DEFAULT)
