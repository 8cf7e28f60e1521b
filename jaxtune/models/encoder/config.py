"""What a post-LN encoder can be: sizes, and every choice that changes its function."""

from dataclasses import dataclass
from typing import Literal

from jaxtune.errors import ConfigError
from jaxtune.models.config import check_fields
from jaxtune.models.encoder_parts import Activation
from jaxtune.models.transformer import check_heads


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one encoder: `x = norm(x + attn(x))`, then `x = norm(x + mlp(x))`.

    Attributes:
        vocab_size, width, depth, num_heads, mlp_width: Rows of the token table, channels, blocks, heads, hidden units.
        num_positions: Rows of the table of positions.
        counted_from: None: token i has position i. A number: the real tokens of a text have the positions
            `counted_from`, `counted_from + 1`, ... and every token with the id `counted_from - 1`, padding, has that
            position (RoBERTa).
        num_segments: Rows of the table of segments, None without one.
        norm_eps: Of every norm.
        pooler: Whether the dense layer with tanh on the first token is there that BERT was pre-trained with.
        head: "none": the stream comes out. "vocabulary": logits of every token. "sequence": `num_outputs` a text.
            "tokens": `num_outputs` a token (tags; start and end of an answer).
        head_dense: Activation of the head's own dense layer, which a norm follows in "vocabulary". "none" without
            such a layer: "tokens" never has one, "sequence" without one reads the pooler.
        tied: Whether the head "vocabulary" reads the token table.
        num_outputs: Of the heads "sequence" and "tokens".
        next_sentence: Whether a second head with two outputs reads the pooler, beside "vocabulary".
    """

    vocab_size: int
    num_positions: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    counted_from: int | None = None
    num_segments: int | None = None
    activation: Activation = "gelu"
    norm_eps: float = 1e-12
    pooler: bool = False
    head: Literal["none", "vocabulary", "sequence", "tokens"] = "none"
    head_dense: Literal["none", "tanh", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"] = "none"
    tied: bool = True
    num_outputs: int | None = None
    next_sentence: bool = False

    def __post_init__(self):
        check_fields(self)
        check_heads(self)
        for complaint in self._complaints():
            raise ConfigError(f"encoder.Config does not make sense: {complaint}.")

    def _complaints(self):
        if (self.head in ("sequence", "tokens")) != (self.num_outputs is not None):
            yield f"head {self.head!r} with num_outputs {self.num_outputs}; 'sequence' and 'tokens' have them, no other"
        has_dense = self.head_dense != "none"
        if (self.head == "vocabulary" and not has_dense) or (self.head in ("none", "tokens") and has_dense):
            yield f"head {self.head!r} with head_dense {self.head_dense!r}"
        if self.head == "sequence" and not has_dense and not self.pooler:
            yield "head 'sequence' has neither a dense layer of its own nor a pooler to read"
        if self.next_sentence and not (self.pooler and self.head == "vocabulary"):
            yield "next_sentence needs a pooler and the head 'vocabulary'"
        if self.max_length < 1:
            yield f"positions counted from {self.counted_from} in a table of {self.num_positions}"

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return self.num_positions - (self.counted_from or 0)

    @property
    def padding(self) -> int:
        """Token id that stands behind a text."""
        return 0 if self.counted_from is None else self.counted_from - 1
