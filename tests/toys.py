"""Networks as bare trees with a spec: what alignment sees, without any model behind it."""

from types import SimpleNamespace

import numpy as np

from jaxtune import symmetry, tree
from jaxtune.models.transformer_form import declare_form
from jaxtune.symmetry import Group

LEAVES_OF_NORM = ("scale", "bias")


def toy_transformer(seed, *, width=64, depth=3, heads=4, hidden=128, junctions="shared", inside="separate"):
    """(spec, params) of a pre-LN transformer with random weights scaled by fan-in."""
    draw, units = np.random.default_rng(seed), width // heads

    def normal(*shape, scale):
        return (scale * draw.normal(size=shape)).astype(np.float32)

    def kernel(*shape, fan_in):
        return normal(*shape, scale=fan_in**-0.5)

    def stream(n):
        return "stream" if junctions == "shared" else f"stream_{n}"

    names = ["stream"] if junctions == "shared" else [stream(n) for n in range(2 * depth + 1)]
    last = stream(2 * depth)
    groups = [Group(stream(0), width, role="stream")]
    params = {
        "patch/kernel": kernel(49, width, fan_in=49),
        "position": normal(17, width, scale=0.1),
        "final_norm/scale": 1 + normal(width, scale=0.1),
        "final_norm/bias": normal(width, scale=0.1),
        "head/kernel": kernel(width, 32, fan_in=width),
    }
    axes = {"patch/kernel": (None, stream(0)), "position": (None, stream(0)), "head/kernel": (last, None)}
    axes |= {f"final_norm/{x}": (last,) for x in LEAVES_OF_NORM}
    for b in range(depth):
        head, up = f"block_{b}/attn/head", f"block_{b}/mlp/hidden"
        qk, vo = (f"block_{b}/attn/{'inside' if inside == 'joint' else x}" for x in ("qk", "vo"))
        before, between, after = stream(2 * b), stream(2 * b + 1), stream(2 * b + 2)
        groups.append(Group(head, heads, role="head"))
        groups += [Group(n, units, parent=head, role=n.split("/")[-1]) for n in dict.fromkeys((qk, vo))]
        groups += [Group(between, width, role="stream")] if junctions == "each" else []
        groups.append(Group(up, hidden))
        groups += [Group(after, width, role="stream")] if junctions == "each" else []
        for norm, owner in (("norm1", before), ("norm2", between)):
            params[f"block_{b}/{norm}/scale"] = 1 + normal(width, scale=0.1)
            params[f"block_{b}/{norm}/bias"] = normal(width, scale=0.1)
            axes |= {f"block_{b}/{norm}/{x}": (owner,) for x in LEAVES_OF_NORM}
        for name, owner in (("q", qk), ("k", qk + "*"), ("v", vo)):
            params[f"block_{b}/attn/{name}/kernel"] = kernel(width, heads, units, fan_in=width)
            params[f"block_{b}/attn/{name}/bias"] = normal(heads, units, scale=0.1)
            axes[f"block_{b}/attn/{name}/kernel"] = (before, head, owner)
            axes[f"block_{b}/attn/{name}/bias"] = (head, owner)
        params[f"block_{b}/attn/out/kernel"] = kernel(heads, units, width, fan_in=width)
        axes[f"block_{b}/attn/out/kernel"] = (head, vo + "*", between)
        params[f"block_{b}/attn/out/bias"] = normal(width, scale=0.1)
        axes[f"block_{b}/attn/out/bias"] = (between,)
        params[f"block_{b}/mlp/up/kernel"] = kernel(width, hidden, fan_in=width)
        axes[f"block_{b}/mlp/up/kernel"] = (between, up)
        params[f"block_{b}/mlp/up/bias"] = normal(hidden, scale=0.1)
        axes[f"block_{b}/mlp/up/bias"] = (up,)
        params[f"block_{b}/mlp/down/kernel"] = kernel(hidden, width, fan_in=hidden)
        axes[f"block_{b}/mlp/down/kernel"] = (up, after)
        params[f"block_{b}/mlp/down/bias"] = normal(width, scale=0.1)
        axes[f"block_{b}/mlp/down/bias"] = (after,)
    blind = [f"block_{b}/attn/k/bias" for b in range(depth)]
    form = declare_form(
        SimpleNamespace(depth=depth), inputs=["patch/kernel", "position"], readers=[("head/kernel", None)]
    )
    return symmetry.make_spec(groups, axes, unmatched=blind, junctions=names, form=form), tree.unflatten(params)


def residual_mlp(seed, width, *, depth=3, inputs=8, outputs=4):
    """(spec, params) of a residual MLP: one stream, one hidden layer per block."""
    draw = np.random.default_rng(seed)
    shapes = {"embed": (inputs, width), "head": (width, outputs)}
    axes = {"embed": (None, "stream"), "head": ("stream", None)}
    for b in range(depth):
        shapes |= {f"block_{b}/up": (width, width), f"block_{b}/down": (width, width)}
        axes |= {f"block_{b}/up": ("stream", f"hidden_{b}"), f"block_{b}/down": (f"hidden_{b}", "stream")}
    params = {p: (draw.normal(size=s) / np.sqrt(s[0])).astype(np.float32) for p, s in shapes.items()}
    groups = [Group("stream", width, role="stream"), *(Group(f"hidden_{b}", width) for b in range(depth))]
    return symmetry.make_spec(groups, axes, junctions=["stream"]), tree.unflatten(params)


def add_noise(params, noise, seed):
    """Each leaf plus `noise` of its own standard deviation."""
    draw = np.random.default_rng(seed)
    return tree.map_leaves(lambda _, x: (x + noise * x.std() * draw.normal(size=x.shape)).astype(np.float32), params)


def share_recovered(spec, found, planted):
    """Role -> share of units that the found element sends where the planted one does."""
    shares = {}
    for name in found:
        group = spec.groups[name]
        shares.setdefault(group.role, []).append(np.mean(np.asarray(found[name]) == np.asarray(planted[name])))
    return {role: float(np.mean(values)) for role, values in shares.items()}
