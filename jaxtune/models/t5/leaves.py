"""Every leaf of a T5: shape, owners of its axes, how it is drawn; one table for `init` and `symmetry`."""

from collections.abc import Iterator
from typing import Any

import jax

from jaxtune.models.declared import Declared, bias, draw, gain, kernel, table
from jaxtune.models.t5.config import Config


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters."""
    return draw(key, list_leaves(config))


def list_leaves(config: Config) -> Iterator[Declared]:
    """Every leaf, in the order in which a text meets them."""
    stream = stream_of(config)
    yield table("embed/token", (config.vocab_size, config.width), stream)
    for stack, depth in config.stacks.items():
        # One number a head and bucket, stored once and read by all blocks: their heads have one order.
        shape = (config.num_buckets, config.num_heads)
        yield bias(f"{stack}/distance", shape, (None, head_of(stack)))
        for index in range(depth):
            block = f"{stack}/block_{index}"
            yield from _list_norm(config, f"{block}/norm1", stream)
            yield from _list_attention(config, f"{block}/attn", head_of(stack), stream)
            if stack == "decoder":
                yield from _list_norm(config, f"{block}/cross_norm", stream)
                yield from _list_attention(config, f"{block}/cross", f"{block}/cross/head", stream)
            yield from _list_norm(config, f"{block}/norm2", stream)
            yield from _list_mlp(config, f"{block}/mlp", stream)
        yield from _list_norm(config, f"{stack}/final_norm", stream)
    if config.head == "tokens" and not config.tied:
        yield kernel("head/kernel", (config.width, config.vocab_size), (stream, None))


def stream_of(config: Config) -> str | None:
    """Owner of the axes of both streams, which the shared table makes one; None where a stream is the output."""
    return None if config.head == "none" else "stream"


def head_of(stack: str) -> str:
    """Owner of the heads of all self-attentions of a stack."""
    return f"{stack}/attn/head"


def _list_norm(config, path, stream):
    # A channel's sign passes the norm and cancels in whatever reads it; the gain keeps its own.
    yield gain(f"{path}/scale", (config.width,), (stream and f"{stream}~",))


def _list_attention(config, path, head, stream):
    width, heads, units = config.width, config.num_heads, config.head_width
    qk, vo = f"{path}/qk", f"{path}/vo"
    for name, owner in (("q", qk), ("k", f"{qk}*"), ("v", vo)):
        yield kernel(f"{path}/{name}/kernel", (width, heads, units), (stream, head, owner), num_out=2)
    yield kernel(f"{path}/out/kernel", (heads, units, width), (head, f"{vo}*", stream))


def _list_mlp(config, path, stream):
    width, hidden, units = config.width, config.mlp_width, f"{path}/hidden"
    if config.gated:
        # The gate goes through the activation, which would see a sign.
        yield kernel(f"{path}/gate/kernel", (width, hidden), (stream, f"{units}~"))
    yield kernel(f"{path}/up/kernel", (width, hidden), (stream, units))
    yield kernel(f"{path}/down/kernel", (hidden, width), (f"{units}*", stream))
