"""Searches that were finished before a run was killed are not done again."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.symmetry.spec import Spec

_FOLDER: ContextVar[Path | None] = ContextVar("folder of finished searches", default=None)


@contextlib.contextmanager
def remember_searches(folder: Path) -> Iterator[None]:
    """Within the block, the result of every search is kept in `folder`, and taken from there where it is known.

    A search is known by its key, its options and its symmetry, and not by the weights: the folder belongs to one set of
    networks, which the caller sees to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def recall_search(key: jax.Array, spec: Spec, options: Mapping[str, Any]) -> tuple[dict, dict] | None:
    """(element, other fields) of a finished search; None where it is not known."""
    folder = _FOLDER.get()
    place = None if folder is None else folder / _name_of(key, spec, options)
    if place is None or not place.exists():
        return None
    with np.load(place, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    fields = json.loads(str(arrays.pop("fields")))
    return {name: arrays[f"group {name}"] for name in spec.groups}, fields


def keep_search(
    key: jax.Array, spec: Spec, options: Mapping[str, Any], element: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    """Keeps what a search found, where there is a folder for it."""
    folder = _FOLDER.get()
    if folder is None:
        return
    place = folder / _name_of(key, spec, options)
    part = place.with_suffix(".part")
    with open(part, "wb") as file:
        arrays = {f"group {name}": np.asarray(value) for name, value in element.items()}
        np.savez(file, fields=np.array(json.dumps(fields)), **arrays)
    part.rename(place)


def _name_of(key, spec, options):
    groups = [(name, group.kind, group.size) for name, group in spec.groups.items()]
    facts = [np.asarray(jax.random.key_data(key)).tolist(), dict(sorted(options.items())), groups]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32] + ".npz"


def keep_progress(key: jax.Array, options: Mapping[str, Any], state: Any, facts: Mapping[str, Any]) -> None:
    """Keeps the state of a training that is under way, where there is a folder for it; the last one alone.

    Args:
        key, options: By which the training is known.
        state: Tree of arrays.
        facts: Plain values beside it.
    """
    folder = _FOLDER.get()
    if folder is None:
        return
    place = folder / _name_of_progress(key, options)
    part = place.with_suffix(".part")
    with open(part, "wb") as file:
        arrays = {f"leaf {n}": np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(state))}
        np.savez(file, facts=np.array(json.dumps(facts)), **arrays)
    part.rename(place)


def recall_progress(key: jax.Array, options: Mapping[str, Any], like: Any) -> tuple[Any, dict[str, Any]] | None:
    """(state, facts) as `keep_progress` was given them last; None where there is nothing, or nothing of this shape."""
    folder = _FOLDER.get()
    place = None if folder is None else folder / _name_of_progress(key, options)
    if place is None or not place.exists():
        return None
    leaves, structure = jax.tree.flatten(like)
    with np.load(place, allow_pickle=False) as stored:
        facts = json.loads(str(stored["facts"]))
        kept = [stored[name] for name in stored.files if name != "facts"]
    if [leaf.shape for leaf in kept] != [np.shape(leaf) for leaf in leaves]:
        return None
    return jax.tree.unflatten(structure, kept), facts


def _name_of_progress(key, options):
    facts = ["progress", np.asarray(jax.random.key_data(key)).tolist(), dict(sorted(options.items()))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32] + ".npz"
