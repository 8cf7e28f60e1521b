"""Which of the things in a torch file are the weights: a state dict, bare or among the notes of a training run."""

from typing import Any

from jaxtune.checkpoint.pickle_values import kind_of
from jaxtune.checkpoint.torch_objects import TensorRef
from jaxtune.errors import CheckpointError
from jaxtune.tree import MAX_LINES

# Where training loops put the weights; beside one of these, a tensor at the top is a loss and no weight.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIX = "module."  # of DataParallel


def find_state_dict(where: str, value: Any) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The state dict of what a file holds.

    That is the object itself, or the one dict of tensors in it. The prefix "module." goes where every name has it.

    Args:
        where: The file, for messages.
        value: What `read_pickle` gave.

    Returns:
        tensors: Name -> reference, in the order of the file.
        left_out: What else there is -> why it is not carried along.

    Raises:
        CheckpointError: no dict, no tensor, a name that is no text, or several dicts of tensors.
    """
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: expected a state dict, tensors by name, found {kind_of(value)}. In torch, save "
            "model.state_dict()."
        )
    dicts = {name: item for name, item in value.items() if isinstance(item, dict)}
    has_tensors = {id(item): any(isinstance(x, TensorRef) for x in item.values()) for item in _distinct(dicts.values())}
    inner = {name: item for name, item in dicts.items() if has_tensors[id(item)]}
    is_bare = any(isinstance(item, TensorRef) for item in value.values())
    known = [name for name in inner if name in WRAPPERS]
    if len(inner) > 1 or (inner and is_bare and not known):
        names = ", ".join(repr(name)[:60] for name in list(inner)[:MAX_LINES])
        raise CheckpointError(
            f"{where}: several dicts of tensors: {names}{' and the file itself' if is_bare else ''}. Which one is "
            "meant cannot be told; in torch, save that one alone."
        )
    left_out: dict[str, str] = {}
    if inner:
        ((key, state),) = inner.items()
        others = {str(name): item for name, item in value.items() if name != key}
    else:
        key, state, others = None, value, {}
    tensors = {}
    for name, item in state.items():
        if not isinstance(item, TensorRef):
            others[f"{key}: {name}" if key is not None else str(name)] = item
        elif not isinstance(name, str):
            raise CheckpointError(f"{where}: expected names of tensors, found {kind_of(name)}. Save a state dict.")
        else:
            tensors[name] = item
    if not tensors:
        raise CheckpointError(
            f"{where}: holds no tensor{'' if not value else ' at its top or one dict below'}. In torch, save "
            "model.state_dict()."
        )
    for name, item in list(others.items())[:MAX_LINES]:
        kind = "a tensor beside the state dict" if isinstance(item, TensorRef) else f"no tensor but {kind_of(item)}"
        left_out[name[:100] if name[:100].isprintable() else repr(name[:100])] = kind
    if len(others) > MAX_LINES:
        left_out["..."] = f"{len(others) - MAX_LINES} more that are no tensors of the state dict"
    if all(name.startswith(PREFIX) and name != PREFIX for name in tensors):
        tensors = {name.removeprefix(PREFIX): ref for name, ref in tensors.items()}
        left_out[PREFIX] = "prefix of every name, as DataParallel writes it; names are without it"
    return tensors, left_out


def _distinct(items):
    """Each object once: a file can name one large dict a million times."""
    return {id(item): item for item in items}.values()
