"""Who owns which axis of a vision transformer, and where its norms are."""

from typing import TYPE_CHECKING

from jaxtune.models.transformer_form import declare_form
from jaxtune.models.transformer_symmetry import Inside, Junctions, StackSymmetry, declare_attention, declare_stack
from jaxtune.symmetry import Form, Group

if TYPE_CHECKING:
    from jaxtune.models.vit import Config


def declare_tower(config: "Config", *, prefix: str = "", junctions: Junctions, inside: Inside) -> StackSymmetry:
    """The rows of `vit.symmetry`, every path and group behind `prefix`."""
    stack = declare_stack(
        config,
        prefix=prefix,
        shortcuts=config.shortcuts,
        junctions=junctions,
        inside=inside,
        layer_scale=config.layer_scale,
        is_gated=config.is_gated,
        has_qkv_bias=config.qkv_bias,
    )
    entry, leave = stack.entry, stack.exit
    rows = {"patch/kernel": (None, None, None, entry), "position": (None, entry)}
    if config.patch_bias:
        rows["patch/bias"] = (entry,)
    rows |= dict.fromkeys(_single_tokens(config), (entry,))
    if config.num_registers:
        rows["registers"] = (None, entry)
    if config.stream_norm:
        rows |= {"stream_norm/scale": (entry,), "stream_norm/bias": (entry,)}
    rows |= {"final_norm/scale": (leave,), "final_norm/bias": (leave,)}
    pooled = leave
    if config.pooling == "attention":
        pooled = _declare_pool(stack, config, prefix, inside)
    if config.head != "none":
        rows |= {f"{name}/kernel": (pooled, None) for name in config.head_names}
        rows |= {f"{name}/bias": (None,) for name in config.biased_head_names}
    stack.axes.update({f"{prefix}{path}": owners for path, owners in rows.items()})
    return stack


def declare_tower_form(config: "Config", *, prefix: str = "") -> Form | None:
    """Where the norms of the tower are, every path behind `prefix`; None where `why_no_form` says why not."""
    if why_no_form(config) is not None:
        return None
    inputs = ["patch/kernel", "position"]
    inputs += ["patch/bias"] if config.patch_bias else []
    inputs += _single_tokens(config)
    inputs += ["registers"] if config.num_registers else []
    pools = config.pooling == "attention"
    biased = config.biased_head_names
    heads = [(f"{name}/kernel", f"{name}/bias" if name in biased else None) for name in config.head_names]
    return declare_form(
        config,
        prefix=prefix,
        inputs=inputs,
        readers=[] if pools else heads,
        entry_norm="stream_norm" if config.stream_norm else None,
        is_gated=config.is_gated,
        layer_scale=config.layer_scale,
        has_qkv_bias=config.qkv_bias,
        pool="pool/attn" if pools else None,
    )


def why_no_form(config: "Config") -> str | None:
    """Why the norms of the tower cannot be folded; None where they can."""
    if config.shortcuts:
        return "it has shortcut matrices"
    if config.head == "none" and config.pooling != "attention":
        return "the features behind its last norm are what comes out, and no reader could take that norm's gain"
    return None


def _single_tokens(config):
    """Leaves that are one token of the stream."""
    present = {
        "class_token": config.has_class_token,
        "distillation_token": config.distillation_token,
        "mask_token": config.mask_token,
    }
    return [name for name, is_present in present.items() if is_present]


def _declare_pool(stack, config, prefix, inside):
    """Adds the rows of `AttentionPool`; returns who owns what it puts out.

    Nothing but the kernel of the queries reads the probe, so its units may stand in any order. What comes out of the
    attention never was the stream: it has an order of its own, free where a head reads it and fixed where it is the
    output.
    """
    pool, units = f"{prefix}pool", config.width // config.num_heads
    head, hidden, probe = f"{pool}/attn/head", f"{pool}/mlp/hidden", f"{pool}/probe"
    qk, vo = (f"{pool}/attn/{'inside' if inside == 'joint' else name}" for name in ("qk", "vo"))
    stack.groups.append(Group(probe, config.width))
    stack.groups.append(Group(head, config.num_heads, role="head"))
    for name in dict.fromkeys((qk, vo)):
        stack.groups.append(Group(name, units, parent=head, role=name.rsplit("/", 1)[1]))
    stack.groups.append(Group(hidden, config.mlp_width, role="hidden"))
    pooled = None
    if config.head != "none":
        pooled = f"{pool}/pooled"
        stack.groups.append(Group(pooled, config.width))
    stack.axes[f"{pool}/probe"] = (probe,)
    attention = declare_attention(f"{pool}/attn", stack.exit, pooled, head, qk, vo, has_qkv_bias=True, asks=probe)
    stack.axes.update(attention)
    stack.axes.update(
        {
            f"{pool}/norm/scale": (pooled,),
            f"{pool}/norm/bias": (pooled,),
            f"{pool}/mlp/up/kernel": (pooled, hidden),
            f"{pool}/mlp/up/bias": (hidden,),
            f"{pool}/mlp/down/kernel": (hidden, pooled),
            f"{pool}/mlp/down/bias": (pooled,),
        }
    )
    stack.unmatched.append(f"{pool}/attn/k/bias")
    return pooled
