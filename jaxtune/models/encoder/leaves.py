"""Every leaf of a post-LN encoder: shape, owners of its axes, how it is drawn; one table for `init` and `symmetry`."""

from collections.abc import Iterator
from typing import Any

import jax

from jaxtune.models.declared import Declared, bias, dense, draw, kernel, layer_norm, table
from jaxtune.models.encoder.config import Config


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters."""
    return draw(key, list_leaves(config))


def list_leaves(config: Config) -> Iterator[Declared]:
    """Every leaf, in the order in which a text meets them."""
    stream = stream_of(config)
    for name, rows in _tables(config).items():
        yield table(f"embed/{name}", (rows, config.width), stream)
    yield from layer_norm("embed/norm", config.width, stream)
    for index in range(config.depth):
        block = f"block_{index}"
        yield from _list_attention(config, f"{block}/attn", stream)
        yield from layer_norm(f"{block}/norm1", config.width, stream)
        hidden = f"{block}/mlp/hidden"
        yield from dense(f"{block}/mlp/up", (config.width, config.mlp_width), (stream, hidden))
        yield from dense(f"{block}/mlp/down", (config.mlp_width, config.width), (f"{hidden}*", stream))
        yield from layer_norm(f"{block}/norm2", config.width, stream)
    if config.pooler:
        yield from dense("pooler", (config.width, config.width), (stream, pooler_of(config)))
    yield from _list_head(config, stream)


def stream_of(config: Config) -> str | None:
    """Owner of the stream's axes: None where the stream is the output."""
    return None if config.head == "none" else "stream"


def pooler_of(config: Config) -> str | None:
    """Owner of what the pooler puts out: None where that comes out."""
    return None if config.head == "none" else "pooler"


def _tables(config):
    rows = {"token": config.vocab_size, "position": config.num_positions}
    return rows if config.num_segments is None else {**rows, "segment": config.num_segments}


def _list_attention(config, path, stream):
    heads, units = config.num_heads, config.width // config.num_heads
    head, qk, vo = (f"{path}/{name}" for name in ("head", "qk", "vo"))
    for name, owner in (("q", qk), ("k", f"{qk}*"), ("v", vo)):
        yield kernel(f"{path}/{name}/kernel", (config.width, heads, units), (stream, head, owner), num_out=2)
        # Softmax does not see what a key bias adds to all scores of a query.
        yield bias(f"{path}/{name}/bias", (heads, units), (head, owner), is_unmatched=name == "k")
    yield kernel(f"{path}/out/kernel", (heads, units, config.width), (head, f"{vo}*", stream))
    yield bias(f"{path}/out/bias", (config.width,), (stream,))


def _list_head(config, stream):
    width, vocab = config.width, config.vocab_size
    own = own_of(config)
    if config.head_dense != "none":
        # Before a tied table the units are the stream's: the stream owns both axes, and a match has one to read.
        yield kernel("head/dense/kernel", (width, width), (stream, own), is_unmatched=own == stream)
        yield bias("head/dense/bias", (width,), (own,))
    if config.head == "vocabulary":
        yield from layer_norm("head/norm", width, own)
        if not config.tied:
            yield kernel("head/kernel", (width, vocab), (f"{own}*", None))
        yield bias("head/bias", (vocab,), (None,))
    elif config.head != "none":
        reads = {"tokens": stream, "sequence": f"{own}*"}[config.head]
        yield from dense("head", (width, config.num_outputs), (reads, None))
    if config.next_sentence:
        yield from dense("next_sentence", (width, 2), ("pooler*", None))


def own_of(config: Config) -> str | None:
    """Owner of the units that the head's last kernel reads."""
    if config.head == "vocabulary" and config.tied:
        return stream_of(config)
    return "head/hidden" if config.head_dense != "none" else pooler_of(config)
