"""CLIP: an image tower and a text tower that meet in one embedding space."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.errors import ConfigError, DataError
from jaxtune.models import vit
from jaxtune.models.config import check_fields
from jaxtune.models.inputs import at_least_float32, open_params
from jaxtune.models.readout import DEFAULT_SCALE, normalise_features
from jaxtune.models.transformer import Activation, Block, LayerNorm, check_heads
from jaxtune.models.transformer_form import declare_form, join_forms
from jaxtune.models.transformer_symmetry import Inside, Junctions, StackSymmetry, declare_stack
from jaxtune.rng import named_key
from jaxtune.symmetry import Spec, make_spec
from jaxtune.types import Params


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes and choices of the text tower: causal, pre-LN, read where the end-of-text token stands."""

    vocab_size: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_fields(self)
        check_heads(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Both towers; `vision.num_outputs` is the shared space's `embed_dim`."""

    vision: vit.Config
    text: TextConfig
    embed_dim: int

    def __post_init__(self):
        check_fields(self)
        if self.vision.num_outputs != self.embed_dim:
            raise ConfigError(
                f"vision.num_outputs is {self.vision.num_outputs}, embed_dim {self.embed_dim}: "
                "the image tower must end in the shared space."
            )


class TextTransformer(nn.Module):
    """int[N, L] -> float[N, embed_dim], in the dtype of the parameters."""

    config: TextConfig
    embed_dim: int

    @nn.compact
    def __call__(self, text):
        config, num_tokens = self.config, text.shape[1]
        table = (config.vocab_size, config.width)
        embedding = self.param("token_embedding", nn.initializers.normal(0.02), table, jnp.float32)
        table = (config.context_length, config.width)
        position = self.param("position", nn.initializers.normal(0.01), table, jnp.float32)
        # An id outside the vocabulary reads NaN, not a neighbour's row.
        x = embedding.at[text].get(mode="fill", fill_value=jnp.nan) + position[None, :num_tokens]
        for index in range(config.depth):
            x = Block(config, is_causal=True, name=f"block_{index}")(x)
        end = jnp.argmax(text, axis=1)  # end-of-text has the greatest id
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = LayerNorm(config.norm_eps, name="final_norm")(x)
        return nn.Dense(self.embed_dim, use_bias=False, name="projection")(x)


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters: {"vision", "text", "logit_scale"}; the last is a logarithm, of 1 / 0.07."""
    return {
        "vision": vit.init(named_key(key, "vision"), config.vision),
        "text": _init_text(named_key(key, "text"), config),
        "logit_scale": jnp.asarray(math.log(DEFAULT_SCALE), jnp.float32),
    }


def apply(config: Config, params: Params, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Features of whatever the batch holds.

    Logits are `logit_scale * image_features @ text_features.T`.

    Shapes:
        batch["image"]: float[N, image_size, image_size, channels], optional.
        batch["text"]: int[M, L] with L at most `context_length`, optional.
        result["image_features"]: float32[N, embed_dim], unit rows.
        result["text_features"]: float32[M, embed_dim], unit rows.
        result["logit_scale"]: float32[]. The factor itself, exp of the leaf.
        All float64 where the parameters are.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: neither image nor text, or not this config's.
    """
    if not {"image", "text"} & batch.keys():
        raise DataError(f'the batch has neither "image" nor "text"; it has: {", ".join(batch) or "nothing"}.')
    params = open_params(init, config, params)
    outputs = {"logit_scale": jnp.exp(params["logit_scale"].astype(at_least_float32(params["logit_scale"].dtype)))}
    if "image" in batch:
        outputs["image_features"] = encode_image(config, params, batch["image"])
    if "text" in batch:
        outputs["text_features"] = encode_text(config, params, batch["text"])
    return outputs


def encode_image(config: Config, params: Params, image: jax.Array) -> jax.Array:
    """Unit features of images.

    Shapes:
        image: float[N, image_size, image_size, channels].
        result: float32[N, embed_dim]; float64 where the parameters are.

    Raises:
        TreeMismatchError, DataError: as `apply`.
    """
    return normalise_features(vit.apply(config.vision, params["vision"], {"image": image}))


def encode_text(config: Config, params: Params, text: jax.Array) -> jax.Array:
    """Unit features of texts; whatever follows the end-of-text token does not count.

    Shapes:
        text: int[N, L], L at most `context_length`. An id outside the vocabulary gives NaN.
        result: float32[N, embed_dim]; float64 where the parameters are.

    Raises:
        TreeMismatchError, DataError: as `apply`.
    """
    text = jnp.asarray(text)
    if text.ndim != 2 or text.shape[1] > config.text.context_length or text.dtype.kind not in "iu":
        raise DataError(
            f"text is {tree.describe_leaf(text)}, the model takes int[N, L] with L at most "
            f"{config.text.context_length}. Use a tokenizer with the context of this checkpoint."
        )
    params = open_params(_init_text, config, params["text"])
    return normalise_features(TextTransformer(config.text, config.embed_dim).apply({"params": params}, text))


def zero_shot_classifier(
    config: Config,
    params: Params,
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenize: Callable[[list[str]], np.ndarray],
    *,
    renormalise: bool = True,
) -> jax.Array:
    """One vector per class: the mean of its unit features over the templates.

    Encodes one template with all classes at a time; on the host, since it handles strings.

    Args:
        config, params: Both towers; only the text tower runs.
        class_names: As they shall read inside a template.
        templates: With "{}" where the class goes, for instance "a photo of a {}.".
        tokenize: The checkpoint's tokenizer, list of C strings -> int32[C, L].
        renormalise: Whether the means get length 1 again, as OpenAI's code does. Without it a class whose
            templates agree has a longer vector and larger logits: so do TransFusion's and GradFix's code,
            and False reproduces them.

    Shapes:
        result: float32[C, embed_dim]; read with `read_out(image_features, result, scale=logit_scale)`.

    Raises:
        ConfigError: no class, no template, or a template without "{}".
        DataError: `tokenize` gives another shape, or ids outside the vocabulary.
    """
    if not class_names or not templates:
        raise ConfigError(f"a classifier needs classes and templates, got {len(class_names)} and {len(templates)}.")
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"template {template!r} has no place for the class; write {{}} where its name goes.")
    features = []
    for template in templates:
        text = np.asarray(tokenize([template.replace("{}", name) for name in class_names]))
        if len(text) != len(class_names) or text.min() < 0 or text.max() >= config.text.vocab_size:
            raise DataError(
                f"tokenize gave {tree.describe_leaf(text)} with ids {text.min()} to {text.max()} for "
                f"{len(class_names)} texts; the model's vocabulary has {config.text.vocab_size}. "
                "Use the tokenizer that the checkpoint was trained with."
            )
        features.append(encode_text(config, params, text))
    mean = jnp.stack(features).mean(axis=0)
    return normalise_features(mean) if renormalise else mean


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """Images and random token ids to compare two networks on."""
    text = config.text
    ids = jax.random.randint(named_key(key, "text"), (size, text.context_length), 0, text.vocab_size, jnp.int32)
    return {**vit.example(key, config.vision, size), "text": ids}


def as_matrix(outputs: Mapping[str, jax.Array]) -> jax.Array:
    """Logits of images against texts: float[N, M]."""
    scale = outputs["logit_scale"].astype(outputs["image_features"].dtype)
    return scale * (outputs["image_features"] @ outputs["text_features"].T)


def symmetry(config: Config, *, junctions: Junctions = "shared", inside: Inside = "separate") -> Spec:
    """Both towers' symmetries, groups and paths behind "vision/" and "text/"; see `declare_stack`.

    Fixed axes: besides those of the image tower, the tokens of the text tower and the shared space, in which
    both towers must keep meeting. `Spec.junctions` lists the image tower's: it describes one stack.

    Raises:
        UnknownNameError: another value of an option.
        ConfigError: shared junctions of an image tower with shortcuts.
    """
    vision = vit.declare_tower(config.vision, prefix="vision/", junctions=junctions, inside=inside)
    text = _declare_text(config.text, junctions=junctions, inside=inside)
    return make_spec(
        [*vision.groups, *text.groups],
        {**vision.axes, **text.axes, "logit_scale": ()},
        unmatched=[*vision.unmatched, *text.unmatched],
        junctions=vision.junctions,
        form=None if config.vision.shortcuts else _declare_form(config),
    )


def is_trainable(config: Config, path: str) -> bool:
    """False for the shortcut kernels of the image tower."""
    return vit.is_trainable(config.vision, path)


def _declare_text(config: TextConfig, *, junctions: Junctions, inside: Inside) -> StackSymmetry:
    stack = declare_stack(config, prefix="text/", junctions=junctions, inside=inside)
    stack.axes.update(
        {
            "text/token_embedding": (None, stack.entry),
            "text/position": (None, stack.entry),
            "text/final_norm/scale": (stack.exit,),
            "text/final_norm/bias": (stack.exit,),
            "text/projection/kernel": (stack.exit, None),
        }
    )
    return stack


def _declare_form(config):
    text = declare_form(
        config.text,
        prefix="text/",
        inputs=["token_embedding", "position"],
        head="projection/kernel",
        head_bias=None,
    )
    return join_forms(vit.declare_tower_form(config.vision, prefix="vision/"), text)


def _init_text(key, config):
    text = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
    return TextTransformer(config.text, config.embed_dim).lazy_init(key, text)["params"]
