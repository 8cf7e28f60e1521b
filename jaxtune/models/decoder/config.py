"""What a decoder-only transformer can be: sizes, and every choice that changes its function."""

from dataclasses import dataclass
from typing import Literal

from jaxtune.errors import ConfigError
from jaxtune.models.config import check_fields
from jaxtune.models.experts import Experts

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
NormKind = Literal["layer", "rms", "rms_plus_one"]
Placement = Literal["pre", "post", "output", "sandwich", "parallel", "parallel_shared"]


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Positions as rotations of queries and keys; plane i of a head has the units i and i + n / 2.

    Attributes:
        theta: Plane i of n / 2 turns by theta ** (-2 i / n) a position.
        fraction: Share of a head's units that turn, the first ones; rounded down.
        scaling: "linear": all frequencies are divided by `factor`. "llama3": those whose wavelength is above
            `original_length / low_frequency` are, those below `original_length / high_frequency` are not, with a ramp
            between.
        factor, low_frequency, high_frequency, original_length: See `scaling`.

    Reference:
        Su et al. 2021, arXiv:2104.09864; the ramp: Llama 3.1.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        check_fields(self)
        if self.fraction > 1:
            raise ConfigError(f"a rotary fraction of {self.fraction} is more than the head.")
        if self.scaling == "llama3" and self.high_frequency <= self.low_frequency:
            raise ConfigError(
                f"rotary scaling llama3 ramps from low_frequency {self.low_frequency} up to high_frequency "
                f"{self.high_frequency}, which must be greater."
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one decoder.

    Attributes:
        vocab_size, width, depth: Rows of the token table, channels of the residual stream, blocks.
        num_heads, num_kv_heads, head_width: Query heads, shared equally by the KV heads; units of a head.
        mlp_width: Hidden units of a dense MLP.
        activation, gated: `down(act(up(x)))`, or `down(act(gate(x)) * up(x))`.
        norm: "layer"; "rms"; "rms_plus_one", whose stored gain counts from 1 (Gemma).
        placement: "pre": `x + f(norm(x))`. "post": `norm(x + f(x))`. "output": `x + norm(f(x))`. "sandwich":
            `x + post_norm(f(norm(x)))`. "parallel": `x + attn(norm1(x)) + mlp(norm2(x))`. "parallel_shared": the
            same with norm1 for both.
        final_norm: Whether a norm stands before the head.
        qkv_bias, out_bias, mlp_bias, head_bias: Whether these have biases.
        num_positions: Rows of a table of learned positions, None without one.
        positions_skip_padding: Whether positions count real tokens alone (OPT), or all.
        position_offset: Rows of the table before position 0; padding reads the one before it.
        embed_width: Width of the token table where a projection leads from it to the stream, and one from the stream
            to it before the head (OPT-350m); None without.
        rotary: None without.
        rotary_windowed: Of the blocks with a window, where it is another one (Gemma 3).
        window: A token sees itself and `window - 1` before it; None for all.
        windowed: Which blocks have the window, one answer a block; None for all.
        attention_scale: Factor of the scores, None for `head_width ** -0.5`.
        attention_softcap, logit_softcap: `cap * tanh(y / cap)` of the scores and of the logits.
        qk_norm: Norm of queries and keys before they turn. "head": of every head, with one gain for all. "whole": of
            all heads together, with a gain for every unit (OLMo-2).
        embed_scale, residual_scale, logit_divisor: What token embeddings and block outputs are multiplied by, and
            logits divided by. The first is rounded to the dtype of the table (Gemma).
        head: "tokens": logits of the next token. "last": `num_outputs` at the last real token. "none": the stream.
        tied: Whether the token table is the head too.
        experts: The mixture in the place of the MLP; None without.
        sparse: Which blocks have it, one answer a block; None for all.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    activation: Activation = "silu"
    gated: bool = True
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    placement: Placement = "pre"
    final_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    num_positions: int | None = None
    positions_skip_padding: bool = False
    position_offset: int | None = None
    embed_width: int | None = None
    rotary: Rotary | None = None
    rotary_windowed: Rotary | None = None
    window: int | None = None
    windowed: tuple[bool, ...] | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qk_norm: Literal["none", "head", "whole"] = "none"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    head: Literal["tokens", "last", "none"] = "tokens"
    tied: bool = False
    num_outputs: int | None = None
    experts: Experts | None = None
    sparse: tuple[bool, ...] | None = None

    def __post_init__(self):
        check_fields(self)
        for complaint in self._complaints():
            raise ConfigError(f"decoder.Config does not make sense: {complaint}.")

    def _complaints(self):
        if self.num_heads % self.num_kv_heads:
            yield f"num_heads {self.num_heads} cannot be shared equally by num_kv_heads {self.num_kv_heads}"
        for name in ("windowed", "sparse"):
            answers = getattr(self, name)
            if answers is not None and len(answers) != self.depth:
                yield f"{name} has {len(answers)} answers for {self.depth} blocks"
        if self.windowed is not None and any(self.windowed) and self.window is None:
            yield "windowed names blocks and window is None"
        for name in ("rotary", "rotary_windowed"):
            rotary = getattr(self, name)
            if rotary is not None and self.count_rotary(rotary) % 2:
                yield f"{name} turns {self.count_rotary(rotary)} units of a head, which make no planes"
        if self.rotary_windowed is not None and (self.rotary is None or self.num_plain):
            yield "rotary_windowed needs rotary, and both need to turn the whole head"
        if self.qk_norm != "none" and (self.rotary is None or self.num_plain or self.norm == "layer"):
            yield f"qk_norm {self.qk_norm!r} is known with an RMS norm and a rotary that turns the whole head"
        if (self.head == "last") != (self.num_outputs is not None):
            yield f"head {self.head!r} with num_outputs {self.num_outputs}; the head 'last' has them, no other"
        if self.head_bias and self.head != "tokens":
            yield f"head_bias without the head 'tokens' but {self.head!r}"
        if self.num_positions is None and (self.positions_skip_padding or self.position_offset is not None):
            yield "positions_skip_padding and position_offset are about a table of positions; num_positions is None"

    def count_rotary(self, rotary: Rotary | None) -> int:
        """Number of a head's units that turn."""
        return 0 if rotary is None else int(self.head_width * rotary.fraction)

    @property
    def num_queries(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_rotary(self) -> int:
        """Number of a head's units that turn."""
        return self.count_rotary(self.rotary)

    @property
    def num_plain(self) -> int:
        """Number of a head's units that do not."""
        return self.head_width - self.num_rotary

    def window_of(self, index: int) -> int | None:
        """Window of block `index`."""
        return self.window if self.windowed is None or self.windowed[index] else None

    def rotary_of(self, index: int) -> Rotary | None:
        """Rotary of block `index`."""
        is_other = self.rotary_windowed is not None and self.window_of(index) is not None
        return self.rotary_windowed if is_other else self.rotary

    def experts_of(self, index: int) -> Experts | None:
        """Mixture of block `index`, None where its MLP is dense."""
        return self.experts if self.sparse is None or self.sparse[index] else None

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of a block's norms."""
        outputs = ("post_norm1", "post_norm2")
        inputs = ("norm1",) if self.placement == "parallel_shared" else ("norm1", "norm2")
        return {"output": outputs, "sandwich": (*inputs, *outputs)}.get(self.placement, inputs)
