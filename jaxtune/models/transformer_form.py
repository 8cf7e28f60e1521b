"""Where a pre-LN transformer keeps its norms, for `symmetry.canonical` to fold."""

from collections.abc import Sequence

from jaxtune.models.transformer import StackConfig
from jaxtune.symmetry import Attention, BranchGain, EntryNorm, Form, Norm, Reader


def declare_form(
    config: StackConfig,
    *,
    prefix: str = "",
    inputs: Sequence[str],
    readers: Sequence[tuple[str, str | None]],
    entry_norm: str | None = None,
    is_gated: bool = False,
    layer_scale: bool = False,
    has_qkv_bias: bool = True,
    pool: str | None = None,
) -> Form:
    """The form of one tower.

    Args:
        config: Depth of the stack.
        prefix: Stands before every path, for instance "vision/".
        inputs: Leaves that write the first stream, without the prefix.
        readers: Kernels behind the final norm and their biases, None where there is none, without the prefix.
        entry_norm: Norm between the inputs and the stream, None where there is none.
        is_gated: Whether the MLPs have gates, which read the same norm.
        layer_scale: Whether the branches have gains of their own.
        has_qkv_bias: Whether queries, keys and values have biases; without them a norm keeps its offset.
        pool: Attention whose keys and values read the final norm (`AttentionPool`), None where there is none.
    """

    def at(path):
        return f"{prefix}{path}"

    def dense(path, has_bias=True):
        return Reader(at(f"{path}/kernel"), at(f"{path}/bias") if has_bias else None)

    def attend(path):
        return Attention(
            v_kernel=at(f"{path}/v/kernel"),
            v_bias=at(f"{path}/v/bias"),
            k_bias=at(f"{path}/k/bias"),
            out_kernel=at(f"{path}/out/kernel"),
            out_bias=at(f"{path}/out/bias"),
        )

    norms, attentions, gains, writers = [], [], [], [at(path) for path in inputs]
    for index in range(config.depth):
        block = f"block_{index}"
        of_block = {
            "norm1": tuple(dense(f"{block}/attn/{name}", has_qkv_bias) for name in "qkv"),
            "norm2": tuple(dense(f"{block}/mlp/{name}") for name in (("gate", "up") if is_gated else ("up",))),
        }
        norms += [Norm(at(f"{block}/{n}/scale"), at(f"{block}/{n}/bias"), reader) for n, reader in of_block.items()]
        attentions += [attend(f"{block}/attn")] if has_qkv_bias else []
        for number, part in enumerate(("attn/out", "mlp/down"), 1):
            written = tuple(at(f"{block}/{part}/{leaf}") for leaf in ("kernel", "bias"))
            writers += written
            gains += [BranchGain(at(f"{block}/layer_scale{number}/scale"), written)] if layer_scale else []
    last = [Reader(at(kernel), None if bias is None else at(bias)) for kernel, bias in readers]
    if pool is not None:
        last += [dense(f"{pool}/{name}") for name in "kv"]
        attentions.append(attend(pool))
    norms.append(Norm(at("final_norm/scale"), at("final_norm/bias"), tuple(last)))
    entries = ()
    if entry_norm is not None:
        scale, bias = (at(f"{entry_norm}/{leaf}") for leaf in ("scale", "bias"))
        entries = (EntryNorm(scale, bias, tuple(at(path) for path in inputs)),)
    return Form(tuple(norms), tuple(attentions), tuple(writers), entries, gains=tuple(gains))


def join_forms(first: Form, second: Form) -> Form:
    """The form of a network of two towers."""
    return Form(
        first.norms + second.norms,
        first.attentions + second.attentions,
        first.writers + second.writers,
        first.entries + second.entries,
        gains=first.gains + second.gains,
    )
