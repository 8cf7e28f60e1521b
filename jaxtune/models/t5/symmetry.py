"""What the weights of a T5 may do."""

from collections.abc import Iterator
from typing import Literal, get_args

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.models.t5.config import Config
from jaxtune.models.t5.form import declare_form
from jaxtune.models.t5.leaves import head_of, list_leaves, stream_of
from jaxtune.symmetry import Group, Spec, make_spec

Scales = Literal["fixed", "free"]


def symmetry(config: Config, *, scales: Scales = "fixed") -> Spec:
    """What the weights may do.

    "stream": order and signs, one for both stacks: they share the token table, and cross-attention reads the
    encoder's stream beside the decoder's. "encoder/attn/head", "decoder/attn/head": one order of the heads of all
    self-attentions of a stack, since all read one table of distances; "decoder/block_i/cross/head": an order of its
    own in every cross-attention, which has no such table. Inside every head any invertible map between queries and
    keys ("qk") and between values and outputs ("vo"), in every block another. "…/mlp/hidden": an order, and signs in a
    gated MLP, where the product with the gate passes them. Without a head the stream is what comes out, so it stays.

    Fixed axes: tokens and buckets of distances.

    Args:
        config: The network.
        scales: "fixed": no scales of hidden units. "free": behind ReLU without a gate every hidden unit has one.

    Raises:
        UnknownNameError: another value of `scales`.
        ConfigError: free scales behind an activation that sees them.
    """
    if scales not in get_args(Scales):
        raise unknown_name("scales", scales, get_args(Scales))
    if scales == "free" and (config.activation != "relu" or config.gated):
        raise ConfigError(
            f'scales="free" needs activation relu and no gate, behind which a positive scale passes; this config has '
            f'{config.activation} and gated={config.gated}. Use scales="fixed".'
        )
    axes = {leaf.path: leaf.owners for leaf in list_leaves(config)}
    junctions = ["stream"] if stream_of(config) else []
    return make_spec(_list_groups(config, scales), axes, junctions=junctions, form=declare_form(config))


def _list_groups(config: Config, scales: str) -> Iterator[Group]:
    if stream_of(config):
        yield Group("stream", config.width, "signed_permutation", role="stream")
    hidden = "scaled_permutation" if scales == "free" else "permutation"
    for stack, depth in config.stacks.items():
        yield Group(head_of(stack), config.num_heads, role="head")
        for index in range(depth):
            block = f"{stack}/block_{index}"
            yield from _list_inside(config, f"{block}/attn", head_of(stack))
            if stack == "decoder":
                yield Group(f"{block}/cross/head", config.num_heads, role="head")
                yield from _list_inside(config, f"{block}/cross", f"{block}/cross/head")
            yield Group(f"{block}/mlp/hidden", config.mlp_width, "signed_permutation" if config.gated else hidden)


def _list_inside(config, path, head):
    for name in ("qk", "vo"):
        yield Group(f"{path}/{name}", config.head_width, "general_linear", parent=head, role=name)
