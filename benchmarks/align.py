"""Time and memory of alignment, beside a plain NumPy and SciPy loop of the same algorithm in the same run.

    python benchmarks/align.py [--width 768 --depth 12 --heads 12 --hidden 3072] [--skip-loop]

Two ViT towers, gaussian weights scaled by fan-in: a planted element with 10 % noise, and independent weights.
Every time is of one process on an otherwise idle machine; "first" holds the compilation, "warm" repeats the call.

Measured on two shared CPU cores, jax 0.10.2, float32, the default sizes (86.2 M weights); seconds:

    case         method       first   warm  sweeps  NumPy loop  recovered
    planted      weights        9.3    7.5       1        17.6      100 %
    planted      transfusion   33.9   38.5       7           -      100 %
    independent  weights       13.9   13.5       1        29.3          -
    independent  transfusion  129.0  125.9      20           -          -

Peak memory of the whole process, trees of both towers and their making included: 2.7 GB. Other work shared the
cores; on an idle machine the first row took 6.3 and 4.8 s.
"""

import argparse
import functools
import json
import platform
import resource
import time

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxtune import symmetry, tree
from jaxtune.align.registry import METHODS
from jaxtune.models import registry, vit
from jaxtune.symmetry import canonical

KEY = jax.random.key(0)


def draw_tower(config, seed):
    """float32 weights of one tower, every leaf with signal: no zero biases, no equal gains."""
    shapes = jax.eval_shape(lambda key: registry.init(key, config), KEY)
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        if path.endswith("kernel"):
            fan_in = np.prod(shape.shape[:-1]) if "out/" in path or "patch" in path else shape.shape[0]
            return (draw.standard_normal(shape.shape, np.float32) / np.float32(np.sqrt(fan_in))).astype(np.float32)
        return (path.endswith("scale") + 0.1 * draw.standard_normal(shape.shape, np.float32)).astype(np.float32)

    return tree.map_leaves(leaf, shapes)


def add_noise(params, noise, seed):
    draw = np.random.default_rng(seed)
    return tree.map_leaves(
        lambda _, x: x + np.float32(noise * x.std()) * draw.standard_normal(x.shape, np.float32), params
    )


def loop_permutations(spec, target, source, *, max_sweeps=100, tolerance=1e-6):
    """The same coordinate ascent in plain NumPy and SciPy: every leaf of every group, every sweep, nothing kept.

    Heads by the exact score, one SciPy call per pair of heads. Returns the number of sweeps.
    """
    target, source = tree.flatten(target), tree.flatten(source)
    element = symmetry.identity(spec)
    matched = [path for path in spec.axes if path not in spec.unmatched]

    def moved(path, skip):
        return symmetry.element.apply_to_leaf(spec, element, path, source[path], skip_axes=skip)

    def unfold(leaf, axes):
        return np.moveaxis(leaf, axes, range(len(axes))).reshape(*[leaf.shape[a] for a in axes], -1)

    for sweep in range(1, max_sweeps + 1):
        gain = total = 0.0
        for name, group in spec.groups.items():
            if group.parent is not None:
                continue
            children = spec.children_of(name)
            if not children:
                score = sum(
                    unfold(target[p], [a]) @ unfold(moved(p, (a,)), [a]).T
                    for p, a in spec.leaves_of(name)
                    if p in matched
                )
                order = linear_sum_assignment(score, maximize=True)[1]
                rows = np.arange(len(order))
                gain += score[rows, order].sum() - score[rows, element[name]].sum()
                total += abs(score[rows, order].sum())
                element[name] = order
                continue
            tables, best = {}, 0.0
            for child in children:
                table = 0.0
                for p, a in spec.leaves_of(child):
                    if p in matched:
                        owners = [axis.group if axis else None for axis in spec.axes[p]]
                        axes = [owners.index(name), a]
                        table = table + np.einsum(
                            "hix,gjx->hgij", unfold(target[p], axes), unfold(moved(p, tuple(axes)), axes), optimize=True
                        )
                tables[child] = table
                solved = [
                    [linear_sum_assignment(table[i, j], maximize=True)[1] for j in range(group.size)]
                    for i in range(group.size)
                ]
                solved = np.array(solved)
                tables[child] = (table, solved)
                best = best + np.take_along_axis(table, solved[..., None], -1)[..., 0].sum(-1)
            order = linear_sum_assignment(best, maximize=True)[1]
            rows = np.arange(len(order))
            old = 0.0
            for child, (table, solved) in tables.items():
                standing = table[rows, element[name]]
                old += np.take_along_axis(standing, element[child][..., None], -1).sum()
                element[child] = solved[rows, order]
            gain += best[rows, order].sum() - old
            total += abs(best[rows, order].sum())
            element[name] = order
        if gain <= tolerance * total:
            return sweep
    return max_sweeps


def timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("width", 768), ("depth", 12), ("heads", 12), ("hidden", 3072)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--skip-loop", action="store_true", help="leave the plain NumPy loop out")
    parser.add_argument("--methods", nargs="*", default=["weights", "transfusion", "full"])
    arguments = parser.parse_args()
    config = vit.Config(
        image_size=224, patch_size=16, width=arguments.width, depth=arguments.depth, num_heads=arguments.heads,
        mlp_width=arguments.hidden, num_outputs=512,
    )  # fmt: skip
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(1)))
    print(json.dumps({
        "jax": jax.__version__, "device": jax.devices()[0].device_kind, "platform": platform.machine(),
        "parameters": tree.count_parameters(jax.eval_shape(lambda key: registry.init(key, config), KEY)),
        "bare_runtime_mb": round(peak_megabytes()),
    }))  # fmt: skip
    source = draw_tower(config, 0)
    shared = registry.symmetry_of(config)
    for case in ("planted", "independent"):
        for method in arguments.methods:
            options = {} if method != "transfusion" else METHODS["transfusion"].spec_options
            spec = registry.symmetry_of(config, **options)
            planted = symmetry.random(jax.random.key(7), spec)
            if method == "transfusion":
                planted |= dict.fromkeys(spec.junctions, planted[spec.junctions[0]])
            target = (
                add_noise(symmetry.apply(spec, planted, source), 0.1, 1) if case == "planted" else draw_tower(config, 2)
            )
            match, ours, theirs = METHODS["weights" if method == "full" else method].match, target, source
            extra = {}
            if method == "full":
                spec, extra = canonical.canonical_spec(shared), {"head_cost": "circuit", "weighting": "unit"}
                ours, theirs = canonical.fold(shared, target), canonical.fold(shared, source)
            row = {"case": case, "method": method}
            for run in ("first", "warm"):
                seconds, result = timed(functools.partial(match, KEY, spec, ours, theirs, **extra))
                row[f"{run}_s"] = round(seconds, 2)
            row["sweeps"] = result.num_sweeps
            if case == "planted" and method != "full":
                hits = [np.mean(np.asarray(result.element[n]) == planted[n]) for n in spec.groups]
                row["recovered"] = round(float(np.mean(hits)), 4)
            if method == "weights" and not arguments.skip_loop:
                seconds, sweeps = timed(functools.partial(loop_permutations, spec, ours, theirs))
                row |= {"numpy_loop_s": round(seconds, 2), "numpy_loop_sweeps": sweeps}
            row["peak_mb"] = round(peak_megabytes())
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
