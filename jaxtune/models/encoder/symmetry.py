"""What the weights of a post-LN encoder may do.

A norm stands *on* the stream, so its gain is the stream's own: no rotation and no sign of one channel passes it, an
order does. What reads the stream through a dense layer of its own may have more.
"""

from typing import Literal, get_args

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.models.encoder.config import Config
from jaxtune.models.encoder.leaves import list_leaves, own_of, pooler_of, stream_of
from jaxtune.symmetry import Group, Spec, make_spec

Scales = Literal["fixed", "free"]


def symmetry(config: Config, *, scales: Scales = "fixed") -> Spec:
    """What the weights may do.

    One order of the stream, orders of heads and hidden units, any invertible map between queries and keys and between
    values and outputs; the units of a dense layer in a head have an order of their own, behind tanh, which is odd,
    signs too. The units before a tied table lie in the stream itself, and that dense layer moves on both sides with
    it. With head "none" the stream is what comes out, so it stays, and so do the outputs of the pooler.

    Args:
        config: The network.
        scales: "fixed": elements that keep every norm, but for maps inside heads. "free": hidden units behind ReLU have
            a positive scale too.

    Raises:
        UnknownNameError: another value of `scales`.
        ConfigError: free scales where nothing stands behind ReLU.

    Reference:
        Differs from TransFusion's BERT, whose order of the units of attention crosses the borders of heads.
    """
    if scales not in get_args(Scales):
        raise unknown_name("scales", scales, get_args(Scales))
    has_relu = config.activation == "relu" or (config.head == "sequence" and config.head_dense == "relu")
    if scales == "free" and not has_relu:
        raise ConfigError(
            f'scales="free" needs an activation relu, which a positive scale passes; this config has '
            f'{config.activation}. Use scales="fixed".'
        )
    leaves = list(list_leaves(config))
    return make_spec(
        _list_groups(config, scales),
        {leaf.path: leaf.owners for leaf in leaves},
        unmatched=[leaf.path for leaf in leaves if leaf.is_unmatched],
        junctions=["stream"] if stream_of(config) else [],
    )


def _list_groups(config, scales):
    groups = [Group("stream", config.width, role="stream")] if stream_of(config) else []
    for index in range(config.depth):
        block, units = f"block_{index}", config.width // config.num_heads
        head = f"{block}/attn/head"
        groups.append(Group(head, config.num_heads, role="head"))
        groups += [Group(f"{block}/attn/{n}", units, "general_linear", parent=head, role=n) for n in ("qk", "vo")]
        groups.append(Group(f"{block}/mlp/hidden", config.mlp_width, _kind_behind(config.activation, scales)))
    if config.pooler and pooler_of(config):
        groups.append(Group("pooler", config.width, "signed_permutation"))
    if config.head_dense != "none" and own_of(config) == "head/hidden":
        # A norm follows in "vocabulary", and it takes the scales of all units together.
        is_alone = config.head == "sequence"
        kind = _kind_behind(config.head_dense, scales) if is_alone else "permutation"
        groups.append(Group("head/hidden", config.width, kind))
    return groups


def _kind_behind(activation, scales):
    if activation == "tanh":
        return "signed_permutation"
    return "scaled_permutation" if activation == "relu" and scales == "free" else "permutation"
