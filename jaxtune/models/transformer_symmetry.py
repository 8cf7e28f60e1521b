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
        stack.groups.append(Group(hidden, config.mlp_width, role="hidden"))
        if each:
            stack.groups.append(Group(after, config.width, role="stream"))
        stack.axes.update(
            {
                f"{block}/norm1/scale": (before,),
                f"{block}/norm1/bias": (before,),
                f"{block}/attn/q/kernel": (before, head, qk),
                f"{block}/attn/q/bias": (head, qk),
                f"{block}/attn/k/kernel": (before, head, f"{qk}*"),
                f"{block}/attn/k/bias": (head, f"{qk}*"),
                f"{block}/attn/v/kernel": (before, head, vo),
                f"{block}/attn/v/bias": (head, vo),
                f"{block}/attn/out/kernel": (head, f"{vo}*", between),
                f"{block}/attn/out/bias": (between,),
                f"{block}/norm2/scale": (between,),
                f"{block}/norm2/bias": (between,),
                f"{block}/mlp/up/kernel": (between, hidden),
                f"{block}/mlp/up/bias": (hidden,),
                f"{block}/mlp/down/kernel": (hidden, after),
                f"{block}/mlp/down/bias": (after,),
            }
        )
        stack.unmatched.append(f"{block}/attn/k/bias")
        if shortcuts:
            rows = {
                f"{block}/shortcut_attn/kernel": (before, between),
                f"{block}/shortcut_mlp/kernel": (between, after),
            }
            stack.axes.update(rows)
            stack.unmatched.extend(rows)
    return stack
