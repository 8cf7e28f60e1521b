"""Where a T5 keeps its norms, for `symmetry.canonical` to fold."""

from jaxtune.models.t5.config import Config
from jaxtune.symmetry import Form, Norm, Reader, Tie


def declare_form(config: Config) -> Form | None:
    """The form of a T5; None without a head, where the stream itself comes out.

    The encoder's last norm is read by every cross-attention of the decoder, which are far more readers than blocks.
    """
    if config.head == "none":
        return None
    norms, writers, across = [], ["embed/token"], []
    for stack, depth in config.stacks.items():
        for index in range(depth):
            block = f"{stack}/block_{index}"
            norms.append(_norm(f"{block}/norm1", *(f"{block}/attn/{name}" for name in "qkv")))
            writers.append(f"{block}/attn/out/kernel")
            if stack == "decoder":
                norms.append(_norm(f"{block}/cross_norm", f"{block}/cross/q"))
                across += [f"{block}/cross/{name}" for name in "kv"]
                writers.append(f"{block}/cross/out/kernel")
            names = ("gate", "up") if config.gated else ("up",)
            norms.append(_norm(f"{block}/norm2", *(f"{block}/mlp/{name}" for name in names)))
            writers.append(f"{block}/mlp/down/kernel")
    norms += [_norm("encoder/final_norm", *across), _norm("decoder/final_norm", "head")]
    tie = Tie("embed/token", "head/kernel", "decoder/final_norm/scale") if config.tied else None
    return Form(tuple(norms), (), tuple(writers), is_centred=False, tie=tie)


def _norm(path, *readers):
    return Norm(f"{path}/scale", None, tuple(Reader(f"{reader}/kernel", None) for reader in readers))
