"""What the weights of a decoder may do without changing its function."""

from typing import Literal

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.models.decoder.config import Config
from jaxtune.models.decoder.form import declare_form, why_no_form
from jaxtune.models.decoder.leaves import STREAM, list_leaves, qk_parts
from jaxtune.models.experts import declare_experts
from jaxtune.symmetry import Group, Spec, make_spec

SCALES = ("fixed", "free")


def symmetry(config: Config, *, scales: Literal["fixed", "free"] = "fixed") -> Spec:
    """Groups: "stream"; in every block the KV heads, the queries of one of them, and the units they share.

    "stream": under RMS norms an order and signs, under layer norms an order. "block_i/attn/head": order of the KV
    heads; "query": of the query heads inside one. "qk": of queries and keys, any invertible map without rotary, a
    complex number a plane with it, a sign a plane behind a norm of queries and keys. Where some units turn and some
    do not, "qk_rotary" are those that do. "vo": of values and outputs, any invertible map. "block_i/mlp/hidden": an
    order, and signs in a gated MLP, where the product with the gate passes them. Mixtures: see `declare_experts`.

    Fixed axes: tokens, positions, outputs, the table's own width where it is not the stream's, and the gains of
    queries and keys. Without a head the stream is what comes out, so it stays.

    Args:
        config: The network.
        scales: "free": behind ReLU every hidden unit has a positive scale too. Not the default, as in
            `mlp.symmetry`.

    Raises:
        UnknownNameError: another value of `scales`.
        ConfigError: free scales behind an activation that sees them.
    """
    if scales not in SCALES:
        raise unknown_name("scales", scales, SCALES)
    if scales == "free" and (config.activation != "relu" or config.gated):
        raise ConfigError(
            f'scales="free" needs activation relu and no gate, behind which a positive scale passes; this config has '
            f'{config.activation} and gated={config.gated}. Use scales="fixed".'
        )
    is_free = config.head != "none" or config.embed_width is not None
    stream = STREAM if is_free else None
    leaves = list(list_leaves(config))
    axes = {leaf.path: leaf.owners if is_free else _hold_stream(leaf.owners) for leaf in leaves}
    kind = "permutation" if config.norm == "layer" else "signed_permutation"
    groups = [Group(STREAM, config.width, kind, role="stream")] if is_free else []
    for index in range(config.depth):
        groups += _attention_groups(config, f"block_{index}/attn")
        experts = config.experts_of(index)
        if experts is None:
            kind = "scaled_permutation" if scales == "free" else "permutation"
            kind = "signed_permutation" if config.gated else kind
            groups.append(Group(f"block_{index}/mlp/hidden", config.mlp_width, kind))
        else:
            more, rows = declare_experts(experts, f"block_{index}/mlp", width_owner=stream)
            groups, axes = [*groups, *more], {**axes, **rows}
    return make_spec(
        groups,
        axes,
        unmatched=[leaf.path for leaf in leaves if leaf.is_unmatched],
        junctions=[STREAM] if is_free else [],
        form=declare_form(config),
        no_form=why_no_form(config),
    )


def _hold_stream(owners):
    return tuple(None if owner in (STREAM, f"{STREAM}~") else owner for owner in owners)


def _attention_groups(config, path):
    head = f"{path}/head"
    yield Group(head, config.num_kv_heads, role="head")
    if config.num_queries > 1:
        yield Group(f"{path}/query", config.num_queries, parent=head, role="query")
    for name, group, units in qk_parts(config):
        turns = config.num_rotary and name != "/plain"
        kind = "general_linear" if not turns else "rotary" if config.qk_norm == "none" else "rotary_signs"
        yield Group(f"{path}/{group}", units, kind, parent=head, role="qk")
    yield Group(f"{path}/vo", config.head_width, "general_linear", parent=head, role="vo")
