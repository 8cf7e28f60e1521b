"""CLIP and SigLIP: an image tower and a text tower that meet in one embedding space."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.errors import ConfigError, DataError
from jaxtune.models import vit
from jaxtune.models.config import check_fields
from jaxtune.models.inputs import at_least_float32, open_params
from jaxtune.models.readout import DEFAULT_SCALE, normalise_features
from jaxtune.models.text_tower import TextTransformer, declare_text, declare_text_form, example_text, init_text
from jaxtune.models.transformer import Activation, check_heads
from jaxtune.models.transformer_form import join_forms
from jaxtune.models.transformer_symmetry import Inside, Junctions
from jaxtune.rng import named_key
from jaxtune.symmetry import Spec, make_spec
from jaxtune.types import Params


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes and choices of the text tower: pre-LN, read where the end-of-text token stands.

    Attributes:
        is_causal: Whether a token sees those before it alone.
        pooling: Which token is read. "max_id": the one with the greatest id, which end-of-text has in CLIP's own
            vocabulary. "end": the first that is `end_id`. "last": the last of the array, padding or not (SigLIP).
        head: "linear": a projection to the shared space. "none": the features come out, in the stream's own order.
        head_bias: Whether the projection has a bias.
    """

    vocab_size: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    is_causal: bool = True
    pooling: Literal["max_id", "end", "last"] = "max_id"
    end_id: int | None = None
    head: Literal["linear", "none"] = "linear"
    head_bias: bool = False

    def __post_init__(self):
        check_fields(self)
        check_heads(self)
        if (self.pooling == "end") != (self.end_id is not None):
            raise ConfigError(f"end_id belongs to pooling 'end', got {self.end_id} with {self.pooling!r}.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Both towers; `vision.num_outputs` is the shared space's `embed_dim`.

    Attributes:
        logit_bias: Whether logits have an offset, as the sigmoid loss wants (SigLIP).
    """

    vision: vit.Config
    text: TextConfig
    embed_dim: int
    logit_bias: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.text.head == "none" or (self.vision.head == "none" and self.vision.pooling != "attention"):
            raise ConfigError("both towers must end in the shared space: one has no head.")
        if self.vision.num_outputs != self.embed_dim:
            raise ConfigError(
                f"vision.num_outputs is {self.vision.num_outputs}, embed_dim {self.embed_dim}: "
                "the image tower must end in the shared space."
            )


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters: {"vision", "text", "logit_scale"}; the last is a logarithm, of 1 / 0.07.

    With `logit_bias` also that, -10 as in SigLIP.
    """
    params = {
        "vision": vit.init(named_key(key, "vision"), config.vision),
        "text": init_text(named_key(key, "text"), config),
        "logit_scale": jnp.asarray(math.log(DEFAULT_SCALE), jnp.float32),
    }
    return params | ({"logit_bias": jnp.asarray(-10.0, jnp.float32)} if config.logit_bias else {})


def apply(config: Config, params: Params, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Features of whatever the batch holds.

    Logits are `logit_scale * image_features @ text_features.T`, plus `logit_bias` where there is one.

    Shapes:
        batch["image"]: float[N, image_size, image_size, channels], optional.
        batch["text"]: int[M, L] with L at most `context_length`, optional.
        batch["mask"]: bool[M, L], True where a token is real, optional; without it all are.
        result["image_features"]: float32[N, embed_dim], unit rows.
        result["text_features"]: float32[M, embed_dim], unit rows.
        result["logit_scale"]: float32[]. The factor itself, exp of the leaf.
        result["logit_bias"]: float32[], where the config has one.
        All float64 where the parameters are.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: neither image nor text, or not this config's.
    """
    if not {"image", "text"} & batch.keys():
        raise DataError(f'the batch has neither "image" nor "text"; it has: {", ".join(batch) or "nothing"}.')
    params = open_params(init, config, params)
    wide = at_least_float32(params["logit_scale"].dtype)
    outputs = {"logit_scale": jnp.exp(params["logit_scale"].astype(wide))}
    if config.logit_bias:
        outputs["logit_bias"] = params["logit_bias"].astype(wide)
    if "image" in batch:
        outputs["image_features"] = encode_image(config, params, batch["image"])
    if "text" in batch:
        outputs["text_features"] = encode_text(config, params, batch["text"], mask=batch.get("mask"))
    return outputs


def encode_image(config: Config, params: Params, image: jax.Array) -> jax.Array:
    """Unit features of images.

    Shapes:
        image: float[N, image_size, image_size, channels].
        result: float32[N, embed_dim]; float64 where the parameters are.

    Raises:
        TreeMismatchError, DataError: as `apply`.
    """
    return normalise_features(vit.encode(config.vision, params["vision"], {"image": image}))


def encode_text(config: Config, params: Params, text: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Unit features of texts; whatever follows the end-of-text token does not count in a causal tower.

    Shapes:
        text: int[N, L], L at most `context_length`. An id outside the vocabulary gives NaN.
        mask: bool[N, L], False where nobody may look.
        result: float32[N, embed_dim]; float64 where the parameters are.

    Raises:
        TreeMismatchError, DataError: as `apply`.
    """
    return normalise_features(read_text(config, params["text"], text, mask=mask))


def read_text(config: Any, params: Params, text: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Features of texts as the tower gives them, of any length.

    Args:
        config: Has `text` and `embed_dim`.
        params: Of the text tower alone.
        text, mask: As `encode_text`.
    """
    text = jnp.asarray(text)
    if text.ndim != 2 or text.shape[1] > config.text.context_length or text.dtype.kind not in "iu":
        raise DataError(
            f"text is {tree.describe_leaf(text)}, the model takes int[N, L] with L at most "
            f"{config.text.context_length}. Use a tokenizer with the context of this checkpoint."
        )
    if mask is not None and (mask.shape != text.shape or mask.dtype.kind not in "biu"):
        raise DataError(f"mask is {tree.describe_leaf(mask)}, expected bool{list(text.shape)}: True for real tokens.")
    mask = None if mask is None else jnp.asarray(mask).astype(bool)
    params = open_params(init_text, config, params)
    outputs = TextTransformer(config.text, config.embed_dim).apply({"params": params}, text, mask)
    return outputs.astype(at_least_float32(outputs.dtype))


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
        features.append(_encode_text(config, params, text))
    mean = jnp.stack(features).mean(axis=0)
    return normalise_features(mean) if renormalise else mean


_encode_text = jax.jit(encode_text, static_argnums=0)


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """Images and random token ids to compare two networks on."""
    return {**vit.example(key, config.vision, size), **example_text(key, config.text, size)}


def as_matrix(outputs: Mapping[str, jax.Array]) -> jax.Array:
    """Logits of images against texts: float[N, M]."""
    dtype = outputs["image_features"].dtype
    logits = outputs["logit_scale"].astype(dtype) * (outputs["image_features"] @ outputs["text_features"].T)
    return logits + outputs["logit_bias"].astype(dtype) if "logit_bias" in outputs else logits


def symmetry(config: Config, *, junctions: Junctions = "shared", inside: Inside = "separate") -> Spec:
    """Both towers' symmetries, groups and paths behind "vision/" and "text/"; see `declare_stack`.

    Fixed axes: besides those of the image tower, the tokens of the text tower and the shared space, in which
    both towers must keep meeting. `Spec.junctions` lists the image tower's: it describes one stack.

    Raises:
        UnknownNameError: another value of an option.
        ConfigError: shared junctions of an image tower with shortcuts.
    """
    vision = vit.declare_tower(config.vision, prefix="vision/", junctions=junctions, inside=inside)
    text = declare_text(config.text, prefix="text/", junctions=junctions, inside=inside)
    forms = (
        vit.declare_tower_form(config.vision, prefix="vision/"),
        declare_text_form(config.text, prefix="text/"),
    )
    return make_spec(
        [*vision.groups, *text.groups],
        {**vision.axes, **text.axes, "logit_scale": (), **({"logit_bias": ()} if config.logit_bias else {})},
        unmatched=[*vision.unmatched, *text.unmatched],
        junctions=vision.junctions,
        form=None if None in forms else join_forms(*forms),
        no_form=vit.why_no_form(config.vision),
    )


def is_trainable(config: Config, path: str) -> bool:
    """False for the shortcut kernels of the image tower."""
    return vit.is_trainable(config.vision, path)
