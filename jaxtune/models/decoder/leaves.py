"""Every leaf of a decoder: its shape, who owns its axes, and how it is drawn; one table for `init` and `symmetry`."""

from collections.abc import Iterator
from typing import Any

import jax

from jaxtune.models.declared import Declared, bias, draw
from jaxtune.models.decoder.config import Config
from jaxtune.models.experts import init_experts
from jaxtune.rng import named_key

STREAM = "stream"


def list_leaves(config: Config) -> Iterator[Declared]:
    """Every leaf but those of mixtures of experts."""
    width, embed_width = config.width, config.embed_width or config.width
    embed = STREAM if config.embed_width is None else None
    yield _kernel("embed/token", (config.vocab_size, embed_width), (None, embed), embed_width)
    if config.num_positions is not None:
        rows = config.num_positions + (config.position_offset or 0)
        yield _kernel("embed/position", (rows, width), (None, STREAM), width)
    if config.embed_width is not None:
        yield _kernel("embed/project_in/kernel", (embed_width, width), (None, STREAM), embed_width)
        yield _kernel("embed/project_out/kernel", (width, embed_width), (STREAM, None), width)
    for index in range(config.depth):
        block = f"block_{index}"
        for name in config.norms:
            yield from _list_norm(config, f"{block}/{name}")
        yield from _list_attention(config, f"{block}/attn")
        if config.experts_of(index) is None:
            yield from _list_mlp(config, f"{block}/mlp")
    if config.final_norm:
        yield from _list_norm(config, "final_norm")
    if config.head == "last":
        yield _kernel("head/kernel", (embed_width, config.num_outputs), (embed, None), embed_width)
    if config.head == "tokens" and not config.tied:
        yield _kernel("head/kernel", (embed_width, config.vocab_size), (embed, None), embed_width)
    if config.head_bias:
        yield bias("head/bias", (config.vocab_size,), (None,))


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters: gaussian of variance 1 / fan_in, biases small, gains near 1.

    Args:
        key: Every leaf draws from the stream of its own path.
        config: Sizes.
    """
    params = draw(key, list_leaves(config))
    for index in range(config.depth):
        experts = config.experts_of(index)
        if experts is not None:
            mlp = f"block_{index}/mlp"
            params[f"block_{index}"]["mlp"] = init_experts(named_key(key, mlp), experts, config.width)
    return params


def _list_norm(config, path):
    # Under an RMS norm signs of the stream cancel between a channel and what reads it; the gain keeps its own.
    owner = STREAM if config.norm == "layer" else f"{STREAM}~"
    yield _gain(config, f"{path}/scale", (config.width,), (owner,))
    if config.norm == "layer":
        yield bias(f"{path}/bias", (config.width,), (owner,))


def _list_attention(config, path):
    width, heads, queries, units = config.width, config.num_kv_heads, config.num_queries, config.head_width
    head, vo = f"{path}/head", f"{path}/vo"
    query = f"{path}/query" if queries > 1 else None
    for name, qk, size in qk_parts(config):
        qk = f"{path}/{qk}"
        yield _kernel(f"{path}/q{name}/kernel", (width, heads, queries, size), (STREAM, head, query, qk), width)
        yield _kernel(f"{path}/k{name}/kernel", (width, heads, size), (STREAM, head, f"{qk}*"), width)
        if config.qkv_bias:
            yield bias(f"{path}/q{name}/bias", (heads, queries, size), (head, query, qk))
            yield bias(f"{path}/k{name}/bias", (heads, size), (head, f"{qk}*"), is_unmatched=_is_hidden(config, name))
    yield _kernel(f"{path}/v/kernel", (width, heads, units), (STREAM, head, vo), width)
    if config.qkv_bias:
        yield bias(f"{path}/v/bias", (heads, units), (head, vo))
    owners = (head, query, f"{vo}*", STREAM)
    yield _kernel(f"{path}/out/kernel", (heads, queries, units, width), owners, heads * queries * units)
    if config.out_bias:
        yield bias(f"{path}/out/bias", (width,), (STREAM,))
    if config.qk_norm == "head":
        yield _gain(config, f"{path}/q_norm/scale", (units,), (None,))
        yield _gain(config, f"{path}/k_norm/scale", (units,), (None,))
    if config.qk_norm == "whole":
        yield _gain(config, f"{path}/q_norm/scale", (heads, queries, units), (head, query, None))
        yield _gain(config, f"{path}/k_norm/scale", (heads, units), (head, None))


def _is_hidden(config, name):
    """Whether a key bias adds the same to all scores of a query, to which softmax is blind; a soft cap is not."""
    turns = config.num_rotary and name != "/plain"
    return not turns and config.attention_softcap is None and config.qk_norm == "none"


def qk_parts(config: Config) -> list[tuple[str, str, int]]:
    """(suffix of the paths, name of the group, units) of what queries and keys consist of.

    One part without a suffix, unless some units of a head turn and some do not.
    """
    if config.num_rotary and config.num_plain:
        return [("/rotary", "qk_rotary", config.num_rotary), ("/plain", "qk", config.num_plain)]
    return [("", "qk", config.head_width)]


def _list_mlp(config, path):
    width, hidden, units = config.width, config.mlp_width, f"{path}/hidden"
    # The gate goes through the activation, which would see a sign.
    owners = {"gate": f"{units}~", "up": units} if config.gated else {"up": units}
    for name, owner in owners.items():
        yield _kernel(f"{path}/{name}/kernel", (width, hidden), (STREAM, owner), width)
        if config.mlp_bias:
            yield bias(f"{path}/{name}/bias", (hidden,), (owner,))
    yield _kernel(f"{path}/down/kernel", (hidden, width), (f"{units}*", STREAM), hidden)
    if config.mlp_bias:
        yield bias(f"{path}/down/bias", (width,), (STREAM,))


def _kernel(path, shape, owners, fan_in):
    return Declared(path, shape, owners, 0.0, fan_in**-0.5)


def _gain(config, path, shape, owners):
    return Declared(path, shape, owners, 0.0 if config.norm == "rms_plus_one" else 1.0, 0.1)
