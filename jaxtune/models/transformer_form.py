"""Where a pre-LN transformer keeps its norms, for `symmetry.canonical` to fold."""

from collections.abc import Sequence

from jaxtune.models.transformer import StackConfig
from jaxtune.symmetry import Attention, EntryNorm, Form, Norm, Reader


def declare_form(
    config: StackConfig,
    *,
    prefix: str = "",
    inputs: Sequence[str],
    head: str,
    head_bias: str | None,
    entry_norm: str | None = None,
) -> Form:
    """The form of one tower.

    Args:
        config: Depth of the stack.
        prefix: Stands before every path, for instance "vision/".
        inputs: Leaves that write the first stream, without the prefix.
        head: Kernel behind the final norm, without the prefix.
        head_bias: Its bias, None where it has none.
        entry_norm: Norm between the inputs and the stream, None where there is none.
    """

    def at(path):
        return f"{prefix}{path}"

    def dense(path):
        return Reader(at(f"{path}/kernel"), at(f"{path}/bias"))

    norms, attentions, writers = [], [], [at(path) for path in inputs]
    for index in range(config.depth):
        block = f"block_{index}"
        readers = {
            "norm1": tuple(dense(f"{block}/attn/{name}") for name in "qkv"),
            "norm2": (dense(f"{block}/mlp/up"),),
        }
        norms += [Norm(at(f"{block}/{n}/scale"), at(f"{block}/{n}/bias"), reader) for n, reader in readers.items()]
        attention = at(f"{block}/attn")
        attentions.append(
            Attention(
                v_kernel=f"{attention}/v/kernel",
                v_bias=f"{attention}/v/bias",
                k_bias=f"{attention}/k/bias",
                out_kernel=f"{attention}/out/kernel",
                out_bias=f"{attention}/out/bias",
            )
        )
        writers += [at(f"{block}/{part}/{leaf}") for part in ("attn/out", "mlp/down") for leaf in ("kernel", "bias")]
    reader = Reader(at(head), None if head_bias is None else at(head_bias))
    norms.append(Norm(at("final_norm/scale"), at("final_norm/bias"), (reader,)))
    entries = ()
    if entry_norm is not None:
        scale, bias = (at(f"{entry_norm}/{leaf}") for leaf in ("scale", "bias"))
        entries = (EntryNorm(scale, bias, tuple(at(path) for path in inputs)),)
    return Form(tuple(norms), tuple(attentions), tuple(writers), entries)


def join_forms(first: Form, second: Form) -> Form:
    """The form of a network of two towers."""
    return Form(
        first.norms + second.norms,
        first.attentions + second.attentions,
        first.writers + second.writers,
        first.entries + second.entries,
    )
