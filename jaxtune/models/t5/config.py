"""What a T5 can be: sizes, and every choice that changes its function."""

from dataclasses import dataclass
from typing import Literal

from jaxtune.errors import ConfigError
from jaxtune.models.config import check_fields
from jaxtune.models.encoder_parts import Activation


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one T5: pre-norm blocks, no biases, scores that are not scaled.

    Attributes:
        vocab_size, width, num_heads, head_width, mlp_width: Rows of the token table, which both stacks share, channels,
            heads, units of a head (heads times units need not be the width), hidden units.
        depth: Blocks of the encoder.
        decoder_depth: Blocks of the decoder, None for an encoder alone.
        num_buckets, max_distance: Rows of a stack's table of distances, and the distance from which on all share the
            last row of their direction.
        activation, gated: `down(act(up(x)))`, or `down(act(gate(x)) * up(x))`.
        norm_eps: Of every norm.
        head: "none": the last stream comes out. "tokens": logits of the decoder's next token.
        tied: Whether the head "tokens" reads the token table.
        scaled: Whether the last stream is multiplied by `width ** -0.5` before it (T5 1.0).
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    head_width: int
    mlp_width: int
    decoder_depth: int | None = None
    num_buckets: int = 32
    max_distance: int = 128
    activation: Activation = "gelu_tanh"
    gated: bool = True
    norm_eps: float = 1e-6
    head: Literal["none", "tokens"] = "tokens"
    tied: bool = False
    scaled: bool = False

    def __post_init__(self):
        check_fields(self)
        for complaint in self._complaints():
            raise ConfigError(f"t5.Config does not make sense: {complaint}.")

    def _complaints(self):
        if self.head == "tokens" and self.decoder_depth is None:
            yield "head 'tokens' without a decoder; an encoder alone has the head 'none'"
        if self.num_buckets < 4:  # half of them a direction, half of those for one distance each
            yield f"num_buckets {self.num_buckets} are fewer than 4"
        if self.max_distance <= self.num_buckets // 2:
            yield f"max_distance {self.max_distance} lies among the distances with a bucket of their own"

    @property
    def stacks(self) -> dict[str, int]:
        """Name -> number of blocks."""
        return {"encoder": self.depth} | ({} if self.decoder_depth is None else {"decoder": self.decoder_depth})
