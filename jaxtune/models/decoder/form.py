"""Where a decoder keeps its norms, for `symmetry.canonical` to fold."""

from collections.abc import Iterator

from jaxtune.models.decoder.config import Config
from jaxtune.models.decoder.leaves import qk_parts
from jaxtune.symmetry import Attention, EntryNorm, Form, Norm, Reader, Tie


def why_no_form(config: Config) -> str | None:
    """What keeps a decoder's norms from being folded, None where nothing does."""
    if config.head == "none" and config.embed_width is None:
        return "without a head the stream itself comes out"
    if config.placement == "post":
        return "a norm stands behind each sum, so its gain scales the stream itself"
    if config.norm == "layer" and (config.placement in ("output", "sandwich") or not config.final_norm):
        return "something reads the stream without a layer norm before it and sees its mean"
    return None


def declare_form(config: Config) -> Form | None:
    """The form of a decoder, None where `why_no_form` says why not.

    Norms behind attention and MLP (placements "output" and "sandwich") are entry norms: what they read never is the
    stream and turns by itself, and their gains become matrices between the two.
    """
    if why_no_form(config) is not None:
        return None
    norms, attentions, writers, entries = [], [], _embeddings(config), []
    for index in range(config.depth):
        block = f"block_{index}"
        parts = {
            1: (tuple(_attention_readers(config, f"{block}/attn")), _with_bias(f"{block}/attn/out", config.out_bias)),
            2: (tuple(_mlp_readers(config, index)), tuple(_mlp_writers(config, index))),
        }
        for part, (readers, written) in parts.items():
            if f"norm{part}" in config.norms:
                both = config.placement == "parallel_shared"
                norms.append(_norm(config, f"{block}/norm{part}", readers + (parts[2][0] if both else ())))
            if f"post_norm{part}" in config.norms:
                scale, bias = _leaves_of_norm(config, f"{block}/post_norm{part}")
                entries.append(EntryNorm(scale, bias, written, _counts_from_one(config)))
            writers += written
        if config.qkv_bias and config.out_bias:
            attentions.append(_attention(config, f"{block}/attn"))
    tie, readers = _readout(config)
    if config.final_norm:
        norms.append(_norm(config, "final_norm", readers))
    is_centred = config.norm == "layer"
    return Form(tuple(norms), tuple(attentions), tuple(writers), tuple(entries), is_centred, tie)


def _norm(config, path, readers):
    return Norm(*_leaves_of_norm(config, path), readers, _counts_from_one(config))


def _leaves_of_norm(config, path):
    return f"{path}/scale", f"{path}/bias" if config.norm == "layer" else None


def _counts_from_one(config):
    return config.norm == "rms_plus_one"


def _embeddings(config):
    writers = ["embed/token" if config.embed_width is None else "embed/project_in/kernel"]
    return [*writers, "embed/position"] if config.num_positions is not None else writers


def _readout(config) -> tuple[Tie | None, tuple[Reader, ...]]:
    """(the tie, if there is one; what reads the last stream)."""
    if config.embed_width is not None:
        return None, (Reader("embed/project_out/kernel", None),)
    bias = "head/bias" if config.head_bias else None
    is_tied = config.tied and config.head == "tokens"
    tie = Tie("embed/token", "head/kernel", "final_norm/scale" if config.final_norm else None) if is_tied else None
    return tie, (Reader("head/kernel", bias),)


def _attention_readers(config, attn) -> Iterator[Reader]:
    paths = [f"{attn}/{name}{part}" for part, _, _ in qk_parts(config) for name in "qk"]
    for path in (*paths, f"{attn}/v"):
        yield Reader(f"{path}/kernel", f"{path}/bias" if config.qkv_bias else None)


def _mlp_readers(config, index) -> Iterator[Reader]:
    mlp, experts = f"block_{index}/mlp", config.experts_of(index)
    if experts is None:
        for name in ("gate", "up") if config.gated else ("up",):
            yield Reader(f"{mlp}/{name}/kernel", f"{mlp}/{name}/bias" if config.mlp_bias else None)
        return
    yield Reader(f"{mlp}/router/kernel", None)
    for name in ("gate", "up"):
        yield Reader(f"{mlp}/experts/{name}/kernel", None, axis=1)
    if experts.shared_hidden is not None:
        for name in ("shared/gate", "shared/up", "shared_gate"):
            yield Reader(f"{mlp}/{name}/kernel", None)


def _mlp_writers(config, index) -> Iterator[str]:
    mlp, experts = f"block_{index}/mlp", config.experts_of(index)
    if experts is None:
        yield from _with_bias(f"{mlp}/down", config.mlp_bias)
        return
    yield f"{mlp}/experts/down/kernel"
    if experts.shared_hidden is not None:
        yield f"{mlp}/shared/down/kernel"


def _with_bias(path, has_bias):
    return (f"{path}/kernel", f"{path}/bias") if has_bias else (f"{path}/kernel",)


def _attention(config, attn):
    """Of an attention with biases. A key bias hides from softmax, not from positions nor from a cap."""
    part = "/plain" if config.num_rotary and config.num_plain else ""
    hides = config.num_plain and config.attention_softcap is None and config.qk_norm == "none"
    return Attention(
        v_kernel=f"{attn}/v/kernel",
        v_bias=f"{attn}/v/bias",
        k_bias=f"{attn}/k{part}/bias" if hides else None,
        out_kernel=f"{attn}/out/kernel",
        out_bias=f"{attn}/out/bias",
    )
