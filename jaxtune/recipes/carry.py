"""Models that come from another base, carried to the recipe's base before they are merged."""

import dataclasses

import jax
import numpy as np

from jaxtune.checkpoint import Checkpoint
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.lazy import LazyLeaf, is_lazy, read
from jaxtune.loading import check_same_architecture, open_models, share_vocabulary, understand
from jaxtune.models import registry
from jaxtune.recipes.jobs import MergeJobs, Planned, Transported
from jaxtune.rng import named_key
from jaxtune.transport.prepared import apply_transport
from jaxtune.transport.registry import METHODS, prepare_transport
from jaxtune.tree import check_finite, flatten, is_float, map_leaves, unflatten


def carry_models(jobs: MergeJobs) -> MergeJobs:
    """The jobs with every `Transported` model made.

    Raises:
        ConfigError: a model is the result of an earlier merge that is not made yet.
        JaxtuneError: as `carry`.
    """
    for model in jobs.models:
        if isinstance(model, Planned):
            raise ConfigError(f"{model.path}: the result of an earlier merge of this file. Make that merge first.")
    models = tuple(carry(model, seed=jobs.seed) if isinstance(model, Transported) else model for model in jobs.models)
    return dataclasses.replace(jobs, models=models)


def carry(model: Transported, *, seed: int = 0) -> Checkpoint:
    """The target with the fine-tune of another base, under stored names, in float32 or wider.

    Args:
        model: What to carry, and onto what.
        seed: Of the transport's random choices.

    Returns:
        The target's checkpoint with other tensors; its `layout` keeps the target's dtypes.

    Raises:
        UnknownNameError: no such transport method or option.
        ConfigError, TreeMismatchError: the three are not of one architecture, or of none that we know.
    """
    options = dict(model.options)
    scale = options.pop("scale", 1.0)
    check_transport(model)
    opened = {"source": model.base, "finetuned": model.finetuned, "target": model.target}
    opened = {role: understand(read_made(one), lazy=True) for role, one in opened.items()}
    trees, config = open_models(opened, None, roles_with_own_words=("source", "finetuned"))
    target = trees["target"]
    shared, _ = share_vocabulary(opened, trees, config)
    prepared = prepare_transport(
        named_key(jax.random.key(seed), "transport"),
        lambda **symmetry: registry.symmetry_of(config, **symmetry),
        *shared.values(),
        method=model.method,
        **options,
    )
    wide = map_leaves(
        lambda _, leaf: leaf.astype(_wide(leaf)) if is_float(leaf) else leaf,
        target,
        dtype=lambda _, leaf: _wide(leaf) if is_float(leaf) else leaf.dtype,
    )
    params = apply_transport(prepared, wide, scale)
    check_finite(f"{model.path} carried to {model.target.path}", params)
    codec = opened["target"].layout.codec
    if codec is None:
        return dataclasses.replace(model.target, params=params)
    tensor_of = codec.encoder(params)
    stored = flatten(model.target.params)
    tensors = {
        name: LazyLeaf(tensor.shape, _wide(tensor), lambda name=name: tensor_of(name)) if is_float(tensor) else tensor
        for name, tensor in stored.items()
    }
    tensors |= {name: tensor for name, tensor in stored.items() if codec.table.is_ignored(name)}
    return dataclasses.replace(model.target, params=unflatten(tensors))


def check_transport(model: Transported) -> None:
    """Checks method and options by name, and the three configs against each other, before anything is read.

    Raises:
        UnknownNameError: names the nearest.
        ConfigError: the three are not of one architecture, or of none that we know.
    """
    if model.method not in METHODS:
        raise unknown_name("transport method", model.method, METHODS)
    known = {"scale", *METHODS[model.method].options}
    for option in model.options:
        if option not in known:
            raise unknown_name(f"option of transport method {model.method!r}", option, known)
    three = {"its former base": model.base, "the model": model.finetuned, "base_model": model.target}
    check_same_architecture(three, roles_with_own_words=list(three)[:2])


def read_made(stored: Checkpoint) -> Checkpoint:
    """The same with tensors that are made when read, those of an adapter, in memory: key tables cut arrays only."""
    tensors = flatten(stored.params)
    if not any(map(is_lazy, tensors.values())):
        return stored
    return dataclasses.replace(stored, params=unflatten({name: read(leaf) for name, leaf in tensors.items()}))


def _wide(leaf):
    return np.dtype(np.float64) if leaf.dtype == np.float64 else np.dtype(np.float32)
