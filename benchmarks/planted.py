"""How much noise a planted element of every kind of symmetry survives: share recovered, error of what is moved.

    python benchmarks/planted.py [--seeds 3]

A network A of random weights, an element g of one kind (or of all), and B = g(A) + noise * std(leaf) * N(0, 1) on
every leaf. Matching sees A and B alone. Each cell holds

    share   units whose place was found, in % (scales aside); where units mix, the cosine of found and planted maps
    error   |found(tau) - g(tau)| / |g(tau)| of a task vector tau = 0.1 * std(leaf) * N(0, 1)

both the mean over seeds. "whole group" means folded weights: rotations of the stream (centred ones behind layer
norms), maps inside heads, orders of heads and of hidden units. The decoders have two KV heads of two queries each,
rotary positions and gated MLPs.

Measured on 2026-11-21, two shared CPU cores, jax 0.10.2, float32, 3 seeds, 74 s:

| case | noise 0.0 | noise 0.1 | noise 0.3 | noise 1.0 |
|---|---|---|---|---|
| permutation, ViT | 100.0 / 0.000 | 100.0 / 0.000 | 100.0 / 0.000 | 100.0 / 0.000 |
| signed_permutation, tanh perceptron | 100.0 / 0.000 | 100.0 / 0.000 | 100.0 / 0.000 | 100.0 / 0.000 |
| scaled_permutation, ReLU perceptron | 100.0 / 0.000 | 100.0 / 0.011 | 100.0 / 0.033 | 100.0 / 0.110 |
| scaled_permutation, ResNet-8 | 100.0 / 0.000 | 100.0 / 0.020 | 100.0 / 0.062 | 100.0 / 0.201 |
| orthogonal, residual perceptron | 100.0 / 0.000 | 100.0 / 0.036 | 99.7 / 0.107 | 96.8 / 0.351 |
| centred_orthogonal, ViT | 100.0 / 0.000 | 99.9 / 0.044 | 99.5 / 0.131 | 95.1 / 0.432 |
| general_linear, ViT | 100.0 / 0.000 | 99.9 / 0.050 | 98.8 / 0.150 | 89.5 / 0.475 |
| whole group, ViT | 100.0 / 0.000 | 99.9 / 0.051 | 99.4 / 0.150 | 94.0 / 0.470 |
| rotary, decoder | 100.0 / 0.000 | 100.0 / 0.013 | 100.0 / 0.037 | 99.8 / 0.109 |
| all but rotations, decoder | 100.0 / 0.000 | 100.0 / 0.017 | 99.8 / 0.053 | 98.3 / 0.155 |
| rotary_signs and all else, decoder | 100.0 / 0.000 | 100.0 / 0.018 | 99.8 / 0.053 | 98.4 / 0.152 |
| experts and all else, decoder | 100.0 / 0.000 | 100.0 / 0.020 | 99.8 / 0.059 | 98.2 / 0.173 |
| whole group, decoder | 100.0 / 0.000 | 100.0 / 0.024 | 99.8 / 0.072 | 98.2 / 0.223 |
| whole group, CLIP | 100.0 / 0.000 | 99.9 / 0.053 | 99.2 / 0.155 | 92.1 / 0.494 |
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtune import symmetry, tree
from jaxtune.align.weights import match_weights
from jaxtune.models import clip, decoder, mlp, registry, resnet, vit
from jaxtune.models.experts import Experts
from jaxtune.rng import named_key
from jaxtune.symmetry import Spec, canonical
from jaxtune.types import Params

KEY = jax.random.key(0)
NOISES = (0.0, 0.1, 0.3, 1.0)

PERCEPTRON = {"image_shape": (8, 8, 1), "widths": (96, 96, 96), "num_outputs": 10}
TOWER = vit.Config(
    image_size=32, patch_size=8, channels=1, width=64, depth=3, num_heads=4, mlp_width=128, num_outputs=16
)
TEXT = clip.TextConfig(vocab_size=64, context_length=12, width=48, depth=2, num_heads=3, mlp_width=96)
WIDE = dataclasses.replace(TOWER, width=96, depth=4, num_heads=6, mlp_width=192)
VISION = dataclasses.replace(TOWER, stream_norm=True, patch_bias=False, head_bias=False)
DECODER = decoder.Config(
    vocab_size=64, width=64, depth=3, num_heads=4, num_kv_heads=2, head_width=16, mlp_width=128,
    rotary=decoder.Rotary(theta=100.0),
)  # fmt: skip
NORMED = dataclasses.replace(DECODER, qk_norm="head")
MIXTURE = dataclasses.replace(DECODER, experts=Experts(num_experts=4, num_chosen=2, hidden=64))
FOLDED = {"head_cost": "circuit", "weighting": "unit"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One planted test.

    Attributes:
        config: The network.
        spec: Config -> symmetry of the network, or of its folded weights.
        roles: What of the symmetry is planted, by the roles of its groups; None: everything.
        is_folded: Whether weights are folded first.
        options: Of `match_weights`.
    """

    config: Any
    spec: Callable[[Any], Spec] = registry.symmetry_of
    roles: frozenset[str] | None = None
    is_folded: bool = False
    options: dict[str, str] = dataclasses.field(default_factory=dict)


def turn_the_stream(config) -> Spec:
    """A residual perceptron's stream is read and written by linear maps alone, so any rotation keeps the function."""
    spec = registry.symmetry_of(config)
    kinds = {name: "orthogonal" if group.role == "stream" else group.kind for name, group in spec.groups.items()}
    groups = [dataclasses.replace(group, kind=kinds[name]) for name, group in spec.groups.items()]
    axes = {path: tuple(axis and axis.mark for axis in row) for path, row in spec.axes.items()}
    return symmetry.make_spec(groups, axes, junctions=spec.junctions)


def free_scales(config) -> Spec:
    return registry.symmetry_of(config, scales="free")


def whole_group(config) -> Spec:
    return canonical.canonical_spec(registry.symmetry_of(config))


CASES = {
    "permutation, ViT": Case(WIDE),
    "signed_permutation, tanh perceptron": Case(mlp.Config(**PERCEPTRON, activation="tanh")),
    "scaled_permutation, ReLU perceptron": Case(mlp.Config(**PERCEPTRON), free_scales),
    "scaled_permutation, ResNet-8": Case(resnet.Config(num_outputs=10, depth=8), free_scales),
    "orthogonal, residual perceptron": Case(mlp.Config(**PERCEPTRON, residual=True), turn_the_stream),
    "centred_orthogonal, ViT": Case(TOWER, whole_group, frozenset({"stream"}), True, FOLDED),
    "general_linear, ViT": Case(TOWER, whole_group, frozenset({"qk", "vo"}), True, FOLDED),
    "whole group, ViT": Case(TOWER, whole_group, None, True, FOLDED),
    "rotary, decoder": Case(DECODER, roles=frozenset({"qk"})),
    "all but rotations, decoder": Case(DECODER),
    "rotary_signs and all else, decoder": Case(NORMED),
    "experts and all else, decoder": Case(MIXTURE),
    "whole group, decoder": Case(DECODER, whole_group, None, True, FOLDED),
    "whole group, CLIP": Case(clip.Config(vision=VISION, text=TEXT, embed_dim=16), whole_group, None, True, FOLDED),
}


@dataclasses.dataclass(frozen=True)
class Planted:
    """A source, its fine-tune, a target, and the element that lies between them."""

    spec: Spec
    element: dict[str, np.ndarray]
    source: Params
    task_vector: Params
    target: Params


def draw_params(config, seed: int) -> Params:
    """float32 weights without special values: kernels scaled by fan-in, gains around 1, the rest around 0."""
    draw = np.random.default_rng([seed, 0])
    shapes = jax.eval_shape(lambda key: registry.init(key, config), KEY)

    def fill(path, leaf):
        normal = draw.normal(size=leaf.shape)
        name, owner = path.split("/")[-1], path.split("/")[-2:-1]
        if name == "kernel":
            split = 1 if owner and owner[0] in ("q", "k", "v") else leaf.ndim - 1
            return (normal / np.sqrt(np.prod(leaf.shape[:split]))).astype(np.float32)
        if name == "var":
            return draw.uniform(0.5, 2.0, size=leaf.shape).astype(np.float32)
        return ((name == "scale") + 0.3 * normal).astype(np.float32)

    return tree.map_leaves(fill, shapes)


def noise_like(params: Params, noise: float, *seed: int) -> Params:
    """Independent noise of `noise` times each leaf's own standard deviation."""
    draw = np.random.default_rng(seed)
    return tree.map_leaves(
        lambda _, leaf: (noise * leaf.std() * draw.normal(size=leaf.shape)).astype(leaf.dtype), params
    )


def plant(case: Case, noise: float, seed: int) -> Planted:
    """Draws a network and an element, moves the one by the other and adds noise."""
    spec, source = case.spec(case.config), draw_params(case.config, seed)
    tuned = tree.map_leaves(lambda _, a, b: a + b, source, noise_like(source, 0.1, seed, 1))
    if case.is_folded:
        own = registry.symmetry_of(case.config)
        source, tuned = (canonical.fold(own, params) for params in (source, tuned))
    still, element = symmetry.identity(spec), symmetry.random(named_key(KEY, "planted", seed), spec)
    if case.roles is not None:
        element = {name: (element if spec.groups[name].role in case.roles else still)[name] for name in element}
    moved = symmetry.apply(spec, element, source)
    target = tree.map_leaves(lambda _, a, b: a + b, moved, noise_like(moved, noise, seed, 2))
    return Planted(spec, element, source, tree.task_vector(source, tuned), target)


def find(case: Case, planted: Planted) -> dict[str, np.ndarray]:
    """The element that matching finds between the source and the target."""
    return match_weights(KEY, planted.spec, planted.target, planted.source, **case.options).element


def shares_of(planted: Planted, found) -> dict[str, float]:
    """Kind -> share recovered, over the groups of that kind that something was planted in."""
    shares, still = {}, symmetry.identity(planted.spec)
    for name, group in planted.spec.groups.items():
        ours, truth = found[name], planted.element[name]
        if np.array_equal(truth, still[name]):
            continue
        order = symmetry.KINDS[group.kind].order
        if order is None:
            share = np.vdot(ours, truth) / (np.linalg.norm(ours) * np.linalg.norm(truth))
        else:
            share = np.mean(order(ours) == order(truth))
        shares.setdefault(group.kind, []).append(share)
    return {kind: float(np.mean(values)) for kind, values in shares.items()}


def error_of(planted: Planted, found) -> float:
    """Relative error of the moved task vector against the planted one."""
    ours, truth = (tree.flatten(symmetry.apply(planted.spec, g, planted.task_vector)) for g in (found, planted.element))
    squares = [(np.sum((ours[path] - truth[path]) ** 2.0), np.sum(truth[path] ** 2.0)) for path in truth]
    missed, whole = np.sum(squares, axis=0, dtype=np.float64)
    return float(np.sqrt(missed / whole))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    start = time.perf_counter()
    print(f"| case | {' | '.join(f'noise {noise}' for noise in NOISES)} |")
    print("|---" * (1 + len(NOISES)) + "|")
    for name, case in CASES.items():
        cells = []
        for noise in NOISES:
            shares, errors = [], []
            for seed in seeds:
                planted = plant(case, noise, seed)
                found = find(case, planted)
                shares.append(np.mean(list(shares_of(planted, found).values())))
                errors.append(error_of(planted, found))
            cells.append(f"{100 * np.mean(shares):.1f} / {np.mean(errors):.3f}")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"{time.perf_counter() - start:.0f} s, {len(seeds)} seeds, jax {jax.__version__}, {jax.default_backend()}")


if __name__ == "__main__":
    main()
