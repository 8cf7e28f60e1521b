"""The text tower of CLIP or SigLIP alone, as a family of its own: diffusion models carry one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune.errors import ConfigError, DataError
from jaxtune.models.clip import TextConfig, read_text
from jaxtune.models.config import check_fields
from jaxtune.models.text_tower import declare_text, declare_text_form, example_text, init_text, why_no_form
from jaxtune.models.transformer_symmetry import Inside, Junctions
from jaxtune.symmetry import Spec, make_spec
from jaxtune.types import Params


@dataclass(frozen=True, kw_only=True)
class Config:
    """One text tower; `embed_dim` is what comes out: the width of the projection, or of the stream without one."""

    text: TextConfig
    embed_dim: int

    def __post_init__(self):
        check_fields(self)
        if self.text.head == "none" and self.embed_dim != self.text.width:
            raise ConfigError(
                f"without a head the features of width {self.text.width} come out, embed_dim is {self.embed_dim}."
            )


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters, paths as in `clip` without "text/"."""
    return init_text(key, config)


def apply(config: Config, params: Params, batch: Mapping[str, Any]) -> jax.Array | dict[str, jax.Array]:
    """Features of the texts of a batch, not normalised.

    Shapes:
        batch["text"]: int[N, L], L at most `context_length`.
        batch["mask"]: bool[N, L], True where a token is real, optional.
        result: float32[N, embed_dim]; float64 where the parameters are. Without a head {"features": the same}.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: no text, or not this config's.
    """
    if "text" not in batch:
        raise DataError(f'the batch has no "text"; it has: {", ".join(batch) or "nothing"}.')
    outputs = read_text(config, params, batch["text"], mask=batch.get("mask"))
    return {"features": outputs} if config.text.head == "none" else outputs


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """Random token ids to compare two networks on."""
    return example_text(key, config.text, size)


def symmetry(config: Config, *, junctions: Junctions = "shared", inside: Inside = "separate") -> Spec:
    """What the weights may do; see `declare_stack` for the options. Features without a head move with the stream.

    Raises:
        UnknownNameError: another value of an option.
    """
    stack = declare_text(config.text, prefix="", junctions=junctions, inside=inside)
    return make_spec(
        stack.groups,
        stack.axes,
        unmatched=stack.unmatched,
        junctions=stack.junctions,
        form=declare_text_form(config.text, prefix=""),
        no_form=why_no_form(config.text),
    )
