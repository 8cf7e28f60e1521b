"""Every family of models by name; one call for all of them, dispatched on the config."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.models import clip, clip_text, decoder, encoder, hub, mlp, resnet, resnet_imagenet, t5, vit
from jaxtune.models.config import from_fields, to_fields
from jaxtune.models.keys import KeyTable
from jaxtune.symmetry import Spec
from jaxtune.types import Params


@dataclass(frozen=True)
class Family:
    """What a family of models is to the rest of the package.

    Attributes:
        config: Its config class.
        init: (key, config) -> params.
        apply: (config, params, batch) -> outputs, in evaluation mode.
        symmetry: (config, **options) -> spec.
        example: (key, config, size) -> batch: inputs to compare two networks on when there is no data.
        apply_train: (config, params, batch) -> (outputs, params with new statistics); None without statistics.
        is_trainable: (config, path) -> bool; None where every leaf is.
        as_matrix: Outputs -> float[N, K], for the same; None: all axes but the last are examples.
        observe_norms: (config, params, batch, is_training=) -> what every batch norm is given, for
            `interpolate.repair`; None without batch norms.
    """

    config: type
    init: Callable[..., dict[str, Any]]
    apply: Callable[..., Any]
    symmetry: Callable[..., Spec]
    example: Callable[..., dict[str, Any]]
    apply_train: Callable[..., tuple[Any, dict[str, Any]]] | None = None
    is_trainable: Callable[[Any, str], bool] | None = None
    as_matrix: Callable[[Any], Any] | None = None
    observe_norms: Callable[..., dict[str, Any]] | None = None


FAMILIES: dict[str, Family] = {
    "jaxtune_mlp": Family(mlp.Config, mlp.init, mlp.apply, mlp.symmetry, mlp.example),
    "jaxtune_resnet": Family(
        resnet.Config,
        resnet.init,
        resnet.apply,
        resnet.symmetry,
        resnet.example,
        apply_train=resnet.apply_train,
        is_trainable=resnet.is_trainable,
        observe_norms=resnet.observe_norms,
    ),
    "jaxtune_resnet_imagenet": Family(
        resnet_imagenet.Config,
        resnet_imagenet.init,
        resnet_imagenet.apply,
        resnet_imagenet.symmetry,
        resnet_imagenet.example,
        apply_train=resnet_imagenet.apply_train,
        is_trainable=resnet_imagenet.is_trainable,
        observe_norms=resnet_imagenet.observe_norms,
    ),
    "jaxtune_vit": Family(
        vit.Config,
        vit.init,
        vit.apply,
        vit.symmetry,
        vit.example,
        as_matrix=vit.as_matrix,
        is_trainable=vit.is_trainable,
    ),
    "jaxtune_clip": Family(
        clip.Config,
        clip.init,
        clip.apply,
        clip.symmetry,
        clip.example,
        as_matrix=clip.as_matrix,
        is_trainable=clip.is_trainable,
    ),
    "jaxtune_clip_text": Family(
        clip_text.Config,
        clip_text.init,
        clip_text.apply,
        clip_text.symmetry,
        clip_text.example,
        as_matrix=vit.as_matrix,
    ),
    "jaxtune_decoder": Family(decoder.Config, decoder.init, decoder.apply, decoder.symmetry, decoder.example),
    "jaxtune_encoder": Family(
        encoder.Config, encoder.init, encoder.apply, encoder.symmetry, encoder.example, as_matrix=encoder.as_matrix
    ),
    "jaxtune_t5": Family(t5.Config, t5.init, t5.apply, t5.symmetry, t5.example),
}


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON would hold it: {"model_type": "jaxtune_vit", "width": 768, ...}."""
    model_type, _ = _find(config)
    return {"model_type": model_type, **to_fields(config)}


def config_from_dict(values: Mapping[str, Any]) -> Any:
    """The config that `config_to_dict` wrote.

    Raises:
        ConfigError: no or an unknown "model_type", an unknown or a missing key, or a value that makes no sense.

    The config.json of a family of another library (`models.hub`) gives the native config that computes the same.
    """
    if hub.is_stored_family(values):
        return hub.read_stored_config(values)
    known = ", ".join([*FAMILIES, *sorted(hub.MODULES)])
    if "model_type" not in values:
        raise ConfigError(f'the config has no "model_type", which says what network it describes. Known: {known}.')
    model_type = values["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"unknown model_type {model_type!r}. Known: {known}.")
    fields = {key: value for key, value in values.items() if key != "model_type"}
    return from_fields(FAMILIES[model_type].config, fields)


def is_stored_family(values: Mapping[str, Any]) -> bool:
    """Whether a config is that of a family of another library, read through a key table."""
    return hub.is_stored_family(values)


def read_stored(values: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[Any, KeyTable | None]:
    """(our config, key table) of a checkpoint; the table is None for our own families, whose tensors are named by path.

    Raises:
        ConfigError: as `config_from_dict`.
    """
    if not hub.is_stored_family(values):
        return config_from_dict(values), None
    config = hub.read_stored_config(hub.with_facts(values, tensors))
    return config, hub.stored_key_table(config, values, tensors)


def init(key: jax.Array, config: Any) -> dict[str, Any]:
    """Fresh float32 parameters of the network that `config` describes."""
    return _find(config)[1].init(key, config)


def apply(config: Any, params: Params, batch: Mapping[str, Any]) -> Any:
    """Outputs in evaluation mode: float32[N, num_outputs], or the dict of `clip.apply`. Pure and jittable.

    Raises:
        TreeMismatchError, DataError: the parameters or the batch are not this config's.
    """
    return _find(config)[1].apply(config, params, batch)


def example(key: jax.Array, config: Any, size: int) -> dict[str, Any]:
    """`size` inputs that fit the model, for comparing two networks when there is no data; a function of `key`."""
    return _find(config)[1].example(key, config, size)


def as_matrix(config: Any, outputs: Any) -> jax.Array:
    """Outputs of `apply` as one float[N, K]: logits or features; for CLIP, the logits of images against texts."""
    family = _find(config)[1]
    return outputs.reshape(-1, outputs.shape[-1]) if family.as_matrix is None else family.as_matrix(outputs)


def apply_train(
    config: Any, params: Params, batch: Mapping[str, Any], key: jax.Array
) -> tuple[Any, dict[str, Any] | Params]:
    """Outputs in training mode, and the parameters with the running statistics that the batch leaves.

    Args:
        config, params, batch: As `apply`.
        key: Source of the network's own random bits. No family draws any yet.

    Returns:
        (outputs, params); the very `params` that came in where a family keeps no statistics.
    """
    del key
    family = _find(config)[1]
    if family.apply_train is None:
        return family.apply(config, params, batch), params
    return family.apply_train(config, params, batch)


def observe_norms(config: Any, params: Params, batch: Mapping[str, Any], *, is_training: bool) -> dict[str, Any]:
    """Mean and variance, over a batch, of what every batch norm is given: a tree of the "mean" and "var" leaves.

    Args:
        config, params, batch: As `apply`.
        is_training: Whether the norms divide by the batch's statistics, or by the running ones.

    Raises:
        ConfigError: a family without batch norms.
    """
    model_type, family = _find(config)
    if family.observe_norms is None:
        raise ConfigError(f"{model_type} has no batch norms, and so no statistics to observe.")
    return family.observe_norms(config, params, batch, is_training=is_training)


def symmetry_of(config: Any, **options: Any) -> Spec:
    """The symmetry of the network that `config` describes.

    Transformers know the options `junctions` and `inside`, perceptrons and ResNets `scales`.

    Raises:
        UnknownNameError: another value of an option.
        ConfigError: an option that the family does not have.
    """
    if isinstance(config, Mapping):
        config = config_from_dict(config)
    model_type, family = _find(config)
    known = list(inspect.signature(family.symmetry).parameters)[1:]
    for option, value in options.items():
        if option not in known:
            raise ConfigError(
                f"{model_type} has no symmetry with {option}={value!r}; options of its symmetry: "
                f"{', '.join(known)}. Use a method that does not ask for it, for instance permutation."
            )
    return family.symmetry(config, **options)


# Fields of configs that say how wide a network is inside, and factors that are chosen by them.
WIDTH_FIELDS = frozenset(
    {
        *("width", "mlp_width", "head_width", "embed_width", "num_heads", "num_kv_heads"),
        *("widths", "inner_widths", "stem_width", "width_multiplier", "attention_scale", "embed_scale"),
    }
)


def is_width(field: str, one: Any, other: Any) -> bool:
    """Whether two values of a config's field are widths of the same number of layers; of nested ones `a.b`."""
    if field.rpartition(".")[2] not in WIDTH_FIELDS:
        return False
    return np.shape(one) == np.shape(other)


def vocabulary_axes(config: Any) -> dict[str, int]:
    """Path -> axis of every leaf with one row per token: what grows when the vocabulary does. Empty without one.

    Of two towers, that of the text.
    """
    grown = _with_vocabulary(config, 1)
    if grown is None:
        return {}
    shapes = [tree.flatten(jax.eval_shape(lambda key, c=c: init(key, c), jax.random.key(0))) for c in (config, grown)]
    return {
        path: axis
        for path, leaf in shapes[0].items()
        for axis, size in enumerate(leaf.shape)
        if shapes[1][path].shape[axis] != size
    }


def without_vocabulary(config: Any) -> Any:
    """The config with a vocabulary of 1: equal for two networks that differ in nothing else."""
    size = vocabulary_size(config)
    return config if size is None else _with_vocabulary(config, 1 - size)


def vocabulary_size(config: Any) -> int | None:
    """Rows of the token embedding; None for a network without one."""
    text = getattr(config, "text", config)
    return getattr(text, "vocab_size", None)


def _with_vocabulary(config, change):
    if hasattr(config, "vocab_size"):
        return dataclasses.replace(config, vocab_size=config.vocab_size + change)
    text = getattr(config, "text", None)
    return dataclasses.replace(config, text=_with_vocabulary(text, change)) if hasattr(text, "vocab_size") else None


def is_trainable(config: Any, path: str) -> bool:
    """Whether gradients may move the leaf at `path`: not running statistics, not shortcut kernels."""
    family = _find(config)[1]
    return family.is_trainable is None or family.is_trainable(config, path)


def _find(config):
    """(model_type, family) of a config."""
    for model_type, family in FAMILIES.items():
        if isinstance(config, family.config):
            return model_type, family
    raise ConfigError(f"{config!r} is no model config. Known families: {', '.join(FAMILIES)}.")
