"""Who owns which axis in a stack of pre-LN blocks; a tower adds what stands before and after it."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.models.transformer import StackConfig
from jaxtune.symmetry import Group

Junctions = Literal["shared", "each"]
Inside = Literal["separate", "joint"]


@dataclass(frozen=True)
class StackSymmetry:
    """Rows for `make_spec`.

    Attributes:
        groups: In the order in which the stack meets them.
        axes: Path -> owners, of the leaves of the blocks.
        unmatched: Key biases and shortcut kernels.
        junctions: Stream groups from the entry to the exit.
    """

    groups: list[Group]
    axes: dict[str, tuple[str | None, ...]]
    unmatched: list[str]
    junctions: list[str]

    @property
    def entry(self) -> str:
        """The group that owns what writes the first stream."""
        return self.junctions[0]

    @property
    def exit(self) -> str:
        """The group that owns what reads the last stream."""
        return self.junctions[-1]


def declare_stack(
    config: StackConfig,
    *,
    prefix: str = "",
    shortcuts: bool = False,
    junctions: Junctions = "shared",
    inside: Inside = "separate",
    layer_scale: bool = False,
    is_gated: bool = False,
    has_qkv_bias: bool = True,
) -> StackSymmetry:
    """The symmetry of the blocks alone.

    Args:
        config: Depth and sizes of the stack.
        prefix: Stands before every path and every group name, for instance "vision/".
        shortcuts: Whether the blocks have shortcut kernels; then `junctions` must be "each".
        junctions: "shared": one order of the stream for the whole stack, "stream". "each": one per
            junction as in TransFusion, "stream_0" to "stream_{2 depth}".
        inside: "separate": the units of a head that queries and keys share ("qk") apart from those that
            values and the output share ("vo"). "joint": one order for both, "inside", as in TransFusion.
        layer_scale, is_gated, has_qkv_bias: As in `Block`. A gain follows the stream that its branch writes. A gated
            hidden unit may also change its sign, which the gate does not see.

    Raises:
        UnknownNameError: another value of `junctions` or `inside`.
        ConfigError: `shortcuts` with shared junctions.

    Reference:
        arXiv:2505.22697 for the groups. Differs: the key bias is left out of matching, since softmax
        cannot see it, and queries and values need not share an order inside the head.
    """
    for option, value, known in (("junctions", junctions, Junctions), ("inside", inside, Inside)):
        if value not in get_args(known):
            raise unknown_name(option, value, get_args(known))
    each = junctions == "each"
    if shortcuts and not each:
        raise ConfigError(
            "a network with shortcut kernels was asked for one shared order of the stream. A shared order moves "
            "both axes of each of them, and a spec gives an axis of a leaf to one group once. "
            'Ask for junctions="each", or give the network without shortcuts: a shared order leaves them I.'
        )
    names = [f"{prefix}stream_{n}" for n in range(2 * config.depth + 1)] if each else [f"{prefix}stream"]
    stack = StackSymmetry([Group(names[0], config.width, role="stream")], {}, [], names)
    for index in range(config.depth):
        before, between, after = names[2 * index : 2 * index + 3] if each else names * 3
        block, units = f"{prefix}block_{index}", config.width // config.num_heads
        head, hidden = f"{block}/attn/head", f"{block}/mlp/hidden"
        qk, vo = (f"{block}/attn/{'inside' if inside == 'joint' else name}" for name in ("qk", "vo"))
        stack.groups.append(Group(head, config.num_heads, role="head"))
        for name in dict.fromkeys((qk, vo)):  # once, where they are the same
            stack.groups.append(Group(name, units, parent=head, role=name.rsplit("/", 1)[1]))
        if each:
            stack.groups.append(Group(between, config.width, role="stream"))
        kind = "signed_permutation" if is_gated else "permutation"
        stack.groups.append(Group(hidden, config.mlp_width, kind, role="hidden"))
        if each:
            stack.groups.append(Group(after, config.width, role="stream"))
        stack.axes.update({f"{block}/norm1/scale": (before,), f"{block}/norm1/bias": (before,)})
        stack.axes.update(declare_attention(f"{block}/attn", before, between, head, qk, vo, has_qkv_bias=has_qkv_bias))
        stack.axes.update(
            {
                f"{block}/norm2/scale": (between,),
                f"{block}/norm2/bias": (between,),
                f"{block}/mlp/up/kernel": (between, hidden),
                f"{block}/mlp/up/bias": (hidden,),
                f"{block}/mlp/down/kernel": (f"{hidden}*" if is_gated else hidden, after),
                f"{block}/mlp/down/bias": (after,),
            }
        )
        if is_gated:
            stack.axes[f"{block}/mlp/gate/kernel"] = (between, f"{hidden}~")
            stack.axes[f"{block}/mlp/gate/bias"] = (f"{hidden}~",)
        if layer_scale:
            stack.axes[f"{block}/layer_scale1/scale"] = (between,)
            stack.axes[f"{block}/layer_scale2/scale"] = (after,)
        if has_qkv_bias:
            stack.unmatched.append(f"{block}/attn/k/bias")
        if shortcuts:
            rows = {
                f"{block}/shortcut_attn/kernel": (before, between),
                f"{block}/shortcut_mlp/kernel": (between, after),
            }
            stack.axes.update(rows)
            stack.unmatched.extend(rows)
    return stack


def declare_attention(
    path: str, reads: str, writes: str | None, head: str, qk: str, vo: str, *, has_qkv_bias: bool, asks: str = ""
) -> dict[str, tuple[str | None, ...]]:
    """Path -> owners of one attention.

    Args:
        path: Of the attention.
        reads, writes: Owners of what keys and values read and of what the output writes.
        head, qk, vo: Groups of the heads and of the units inside.
        has_qkv_bias: Whether queries, keys and values have biases.
        asks: Owner of what the queries read, where it is not `reads`.
    """
    rows = {
        f"{path}/q/kernel": (asks or reads, head, qk),
        f"{path}/q/bias": (head, qk),
        f"{path}/k/kernel": (reads, head, f"{qk}*"),
        f"{path}/k/bias": (head, f"{qk}*"),
        f"{path}/v/kernel": (reads, head, vo),
        f"{path}/v/bias": (head, vo),
        f"{path}/out/kernel": (head, f"{vo}*", writes),
        f"{path}/out/bias": (writes,),
    }
    gone = () if has_qkv_bias else [f"{path}/{name}/bias" for name in "qkv"]
    return {leaf: owners for leaf, owners in rows.items() if leaf not in gone}
