"""Decoders as bare trees with a spec, and their forward pass in plain NumPy: what symmetry and alignment see."""

import numpy as np

from jaxtune import symmetry, tree
from jaxtune.symmetry import Group

# How queries and keys meet: kind of the groups inside a head, by name of the part of q and k that they own.
INSIDE = {
    "plain": {"": "general_linear"},
    "rotary": {"": "rotary"},
    "normed": {"": "rotary_signs"},
    "partial": {"rotary/": "rotary", "plain/": "general_linear"},
}


def toy_decoder(
    seed=0,
    *,
    width=32,
    depth=2,
    kv=2,
    query=2,
    units=8,
    hidden=24,
    vocab=40,
    inside="rotary",
    biases=False,
    vo="general_linear",
    experts=0,
    dtype=np.float32,
):
    """(spec, params): an RMSNorm decoder with gated MLPs, or experts; `query` 1 has a fixed query axis."""
    draw = np.random.default_rng(seed)
    groups, axes, params, unmatched = [Group("stream", width, "signed_permutation", role="stream")], {}, {}, []

    def add(path, owners, shape, *, fan_in=None, mean=0.0):
        scale = 0.2 if fan_in is None else fan_in**-0.5
        axes[path], params[path] = owners, (mean + scale * draw.normal(size=shape)).astype(dtype)

    add("embed/token", (None, "stream"), (vocab, width), fan_in=1)
    for b in range(depth):
        attn, mlp = f"block_{b}/attn", f"block_{b}/mlp"
        head, v = f"{attn}/head", f"{attn}/vo"
        q = f"{attn}/query" if query > 1 else None
        groups += [Group(head, kv, role="head")]
        groups += [Group(q, query, parent=head, role="query")] if q else []
        add(f"block_{b}/norm1/scale", ("stream~",), (width,), mean=1)
        add(f"block_{b}/norm2/scale", ("stream~",), (width,), mean=1)
        for part, kind in INSIDE[inside].items():
            length = units if part in ("", "rotary/") else units // 2
            qk = f"{attn}/qk_rotary" if part == "rotary/" else f"{attn}/qk"
            groups.append(Group(qk, length, kind, parent=head, role="qk"))
            add(f"{attn}/q/{part}kernel", ("stream", head, q, qk), (width, kv, query, length), fan_in=width)
            add(f"{attn}/k/{part}kernel", ("stream", head, f"{qk}*"), (width, kv, length), fan_in=width)
            if biases:
                add(f"{attn}/q/{part}bias", (head, q, qk), (kv, query, length))
                add(f"{attn}/k/{part}bias", (head, f"{qk}*"), (kv, length))
                unmatched += [f"{attn}/k/{part}bias"] if kind == "general_linear" else []
        if inside == "normed":
            add(f"{attn}/q_norm/scale", (None,), (units,), mean=1)
            add(f"{attn}/k_norm/scale", (None,), (units,), mean=1)
        groups.append(Group(v, units, vo, parent=head, role="vo"))
        add(f"{attn}/v/kernel", ("stream", head, v), (width, kv, units), fan_in=width)
        if biases:
            add(f"{attn}/v/bias", (head, v), (kv, units))
        add(f"{attn}/out/kernel", (head, q, f"{v}*", "stream"), (kv, query, units, width), fan_in=kv * query * units)
        if experts:
            expert, inner = f"{mlp}/expert", f"{mlp}/hidden"
            groups.append(Group(expert, experts, role="expert"))
            groups.append(Group(inner, hidden, "signed_permutation", parent=expert))
            add(f"{mlp}/router/kernel", ("stream", expert), (width, experts), fan_in=width)
            add(f"{mlp}/experts/gate/kernel", (expert, "stream", f"{inner}~"), (experts, width, hidden), fan_in=width)
            add(f"{mlp}/experts/up/kernel", (expert, "stream", inner), (experts, width, hidden), fan_in=width)
            add(f"{mlp}/experts/down/kernel", (expert, f"{inner}*", "stream"), (experts, hidden, width), fan_in=hidden)
        else:
            inner = f"{mlp}/hidden"
            groups.append(Group(inner, hidden, "signed_permutation"))
            add(f"{mlp}/gate/kernel", ("stream", f"{inner}~"), (width, hidden), fan_in=width)
            add(f"{mlp}/up/kernel", ("stream", inner), (width, hidden), fan_in=width)
            add(f"{mlp}/down/kernel", (f"{inner}*", "stream"), (hidden, width), fan_in=hidden)
    add("final_norm/scale", ("stream~",), (width,), mean=1)
    add("head/kernel", ("stream", None), (width, vocab), fan_in=width)
    return symmetry.make_spec(groups, axes, unmatched=unmatched, junctions=["stream"]), tree.unflatten(params)


def rms_norm(x, gain):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * gain


def turn(x, positions):
    """Rotary positions, half-split: [N, L, ..., n], positions [L]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 100.0 ** (-np.arange(half) / half)  # [L, half]
    angles = angles.reshape(1, len(positions), *[1] * (x.ndim - 3), half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)


def attend(p, attn, x, inside):
    """Causal grouped attention: [N, L, width] -> [N, L, width]."""
    positions, scores = np.arange(x.shape[1]), 0.0
    for part in INSIDE[inside]:
        q = np.einsum("nlw,wgqu->nlgqu", x, p[f"{attn}/q/{part}kernel"])
        k = np.einsum("nlw,wgu->nlgu", x, p[f"{attn}/k/{part}kernel"])
        if f"{attn}/q/{part}bias" in p:
            q, k = q + p[f"{attn}/q/{part}bias"], k + p[f"{attn}/k/{part}bias"]
        if inside == "normed":
            q, k = rms_norm(q, p[f"{attn}/q_norm/scale"]), rms_norm(k, p[f"{attn}/k_norm/scale"])
        if inside in ("rotary", "normed") or part == "rotary/":
            q, k = turn(q, positions), turn(k, positions)
        scores = scores + np.einsum("nlgqu,nmgu->ngqlm", q, k)
    scores = np.where(np.tril(np.ones((len(positions),) * 2, bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    v = np.einsum("nlw,wgu->nlgu", x, p[f"{attn}/v/kernel"])
    if f"{attn}/v/bias" in p:
        v = v + p[f"{attn}/v/bias"]
    return np.einsum("ngqlm,nmgu,gquw->nlw", weights, v, p[f"{attn}/out/kernel"])


def silu(x):
    return x / (1 + np.exp(-x))


def feed(p, mlp, x):
    """A gated MLP, or the two best experts by their router rows."""
    if f"{mlp}/router/kernel" not in p:
        return (silu(x @ p[f"{mlp}/gate/kernel"]) * (x @ p[f"{mlp}/up/kernel"])) @ p[f"{mlp}/down/kernel"]
    logits = x @ p[f"{mlp}/router/kernel"]  # [N, L, experts]
    kept = logits >= np.sort(logits, axis=-1)[..., -2:-1]
    share = np.where(kept, np.exp(logits), 0.0)
    share /= share.sum(axis=-1, keepdims=True)
    gate, up = (np.einsum("nlw,ewh->nleh", x, p[f"{mlp}/experts/{part}/kernel"]) for part in ("gate", "up"))
    return np.einsum("nle,nleh,ehw->nlw", share, silu(gate) * up, p[f"{mlp}/experts/down/kernel"])


def run_decoder(params, tokens, *, inside="rotary"):
    """Logits in float64: int[N, L] -> float64[N, L, vocab]."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}
    x = p["embed/token"][tokens]
    depth = sum(path.endswith("norm1/scale") for path in p)
    for b in range(depth):
        x = x + attend(p, f"block_{b}/attn", rms_norm(x, p[f"block_{b}/norm1/scale"]), inside)
        x = x + feed(p, f"block_{b}/mlp", rms_norm(x, p[f"block_{b}/norm2/scale"]))
    return rms_norm(x, p["final_norm/scale"]) @ p["head/kernel"]


def some_tokens(vocab=40, *, size=3, length=7):
    return np.random.default_rng(5).integers(0, vocab, size=(size, length))
