"""The text tower of CLIP and SigLIP: pre-LN, learned positions, read at one token."""

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.models.text import draw_text
from jaxtune.models.transformer import Block, LayerNorm
from jaxtune.models.transformer_form import declare_form
from jaxtune.models.transformer_symmetry import Inside, Junctions, StackSymmetry, declare_stack
from jaxtune.rng import named_key
from jaxtune.symmetry import Form

if TYPE_CHECKING:
    from jaxtune.models.clip import TextConfig


class TextTransformer(nn.Module):
    """int[N, L] -> float[N, embed_dim], in the dtype of the parameters; without a head float[N, width]."""

    config: "TextConfig"
    embed_dim: int

    @nn.compact
    def __call__(self, text, mask=None):
        config, num_tokens = self.config, text.shape[1]
        table = (config.vocab_size, config.width)
        embedding = self.param("token_embedding", nn.initializers.normal(0.02), table, jnp.float32)
        table = (config.context_length, config.width)
        position = self.param("position", nn.initializers.normal(0.01), table, jnp.float32)
        # An id outside the vocabulary reads NaN, not a neighbour's row.
        x = embedding.at[text].get(mode="fill", fill_value=jnp.nan) + position[None, :num_tokens]
        for index in range(config.depth):
            x = Block(config, is_causal=config.is_causal, name=f"block_{index}")(x, mask)
        x = jnp.take_along_axis(x, self._end_of(text)[:, None, None], axis=1)[:, 0]
        x = LayerNorm(config.norm_eps, name="final_norm")(x)
        if config.head == "none":
            return x
        return nn.Dense(self.embed_dim, use_bias=config.head_bias, name="projection")(x)

    def _end_of(self, text):
        """Index of the token that is read, of every text."""
        if self.config.pooling == "max_id":
            return jnp.argmax(text, axis=1)
        if self.config.pooling == "end":
            return jnp.argmax(text == self.config.end_id, axis=1)  # the first; position 0 where there is none
        return jnp.full(text.shape[:1], text.shape[1] - 1, jnp.int32)


def init_text(key: jax.Array, config: Any) -> dict[str, Any]:
    """Fresh float32 parameters of the text tower of a config that has `text` and `embed_dim`."""
    text = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
    return TextTransformer(config.text, config.embed_dim).lazy_init(key, text)["params"]


def example_text(key: jax.Array, config: "TextConfig", size: int) -> dict[str, jax.Array]:
    """Random texts to compare two networks on: where an end is looked for, of several lengths with their masks."""
    if config.pooling != "end":
        shape = (size, config.context_length)
        return {"text": jax.random.randint(named_key(key, "text"), shape, 0, config.vocab_size, jnp.int32)}
    drawn = draw_text(key, size, config.context_length, config.vocab_size)
    ends = drawn["mask"].sum(axis=1, keepdims=True) - 1
    is_end = jnp.arange(config.context_length)[None] == ends
    # No end before the end; an id next to it stands in its place.
    text = jnp.where(drawn["text"] == config.end_id, (drawn["text"] + 1) % config.vocab_size, drawn["text"])
    return {"text": jnp.where(is_end, min(config.end_id, config.vocab_size - 1), text), "mask": drawn["mask"]}


def declare_text(config: "TextConfig", *, prefix: str, junctions: Junctions, inside: Inside) -> StackSymmetry:
    """The rows of the tower, every path and group behind `prefix`. Fixed axes: the tokens and the shared space."""
    stack = declare_stack(config, prefix=prefix, junctions=junctions, inside=inside)
    rows = {
        "token_embedding": (None, stack.entry),
        "position": (None, stack.entry),
        "final_norm/scale": (stack.exit,),
        "final_norm/bias": (stack.exit,),
    }
    if config.head != "none":
        rows["projection/kernel"] = (stack.exit, None)
        rows |= {"projection/bias": (None,)} if config.head_bias else {}
    stack.axes.update({f"{prefix}{path}": owners for path, owners in rows.items()})
    return stack


def why_no_form(config: "TextConfig") -> str | None:
    """Why the norms of the tower cannot be folded; None where they can."""
    if config.head == "none":
        return "the features behind its last norm are what comes out, and no reader could take that norm's gain"
    return None


def declare_text_form(config: "TextConfig", *, prefix: str) -> Form | None:
    """Where the norms are; None where `why_no_form` says why not."""
    if why_no_form(config) is not None:
        return None
    return declare_form(
        config,
        prefix=prefix,
        inputs=["token_embedding", "position"],
        readers=[("projection/kernel", "projection/bias" if config.head_bias else None)],
    )
