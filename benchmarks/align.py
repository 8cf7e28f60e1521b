"""Time and memory of alignment, beside a plain NumPy and SciPy loop of the same algorithm in the same run.

    python benchmarks/align.py [--rows planted/weights independent/full ...] [--loop-sweeps 2]

Two ViT towers (by default B/16, 86.2 M weights), gaussian, scaled by fan-in: a planted element with 10 % noise,
and independent weights. Every row is a process of its own with one LAPACK thread, as the command line has it.
"first" holds the compilation, "warm" repeats the call; both block on the result. Memory is the process's peak
over the runtime with JAX started, first of all, then over that with both networks loaded.

Measured 2026-11-21 on two CPU cores, jax 0.10.2, numpy 2.4.6, float32; seconds and MiB:

    row                      first   warm  sweeps  over bare  over loaded  recovered  plain loop, 2 sweeps
    planted/weights           4.9    3.9       1        865          207      100 %                 10.59
    planted/transfusion       5.7    4.4       2        909          251      100 %                 25.26
    planted/full             16.4   14.7       2       1024          366      100 %                 15.33
    independent/weights       6.1    5.5       1        862          205                            22.44
    independent/transfusion  22.3   19.2      11        931          273                            26.37
    independent/full         61.3   59.8      12       1017          360                            22.22

The plain loops were stopped after two sweeps, before their end; that of full is the dense solver on the host. Both
networks are 658 MiB of the first column of memory. independent/full varies with what else the machine does.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: threads slow small factorisations down

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxtune import symmetry, tree
from jaxtune.align import assignment
from jaxtune.align.registry import METHODS
from jaxtune.align.weights import match_weights
from jaxtune.cli import prepare_process
from jaxtune.models import registry, vit
from jaxtune.symmetry import canonical
from jaxtune.transport.registry import METHODS as TRANSPORTS

ROWS = [f"{case}/{method}" for case in ("planted", "independent") for method in ("weights", "transfusion", "full")]


def draw_tower(config, seed):
    """float32 weights of one tower, every leaf with signal: no zero biases, no equal gains."""
    shapes = jax.eval_shape(lambda key: registry.init(key, config), jax.random.key(0))
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


def unfold(leaf, axes):
    return np.moveaxis(leaf, axes, range(len(axes))).reshape(*[leaf.shape[a] for a in axes], -1)


def solve(score):
    return linear_sum_assignment(score, maximize=True)[1]


def chosen(score, order):
    return np.take_along_axis(score, order[..., None], -1).sum(dtype=np.float64)


def loop_transfusion(spec, target, source, *, max_sweeps):
    """TransFusion's loop in plain NumPy and SciPy, in order of declaration: every product, spectrum and visit.

    Returns the number of sweeps.
    """
    target, source, element, phase = tree.flatten(target), tree.flatten(source), symmetry.identity(spec), "heads"
    heads = {name for name in spec.groups if spec.children_of(name)}

    def pairs(group, *, extra=None):
        for path, axis in spec.leaves_of(group):
            if path not in spec.unmatched and (extra is None or len(spec.axes[path]) > 2):
                owners = [owner.group if owner else None for owner in spec.axes[path]]
                axes = [axis] if extra is None else [owners.index(extra), axis]
                moved = symmetry.element.apply_to_leaf(spec, element, path, source[path], skip_axes=(axis,))
                yield unfold(target[path], axes), unfold(moved, axes)

    for sweep in range(1, max_sweeps + 1):
        progress = head_progress = False
        for name in [name for name, group in spec.groups.items() if group.parent is None]:
            owned = name if name not in heads or phase == "heads" else spec.children_of(name)[0]
            if name not in heads:
                score = sum(a @ b.T for a, b in pairs(name))
                order = solve(score)
            elif phase == "heads":
                spectra = [
                    (np.linalg.svd(a, compute_uv=False), np.linalg.svd(b, compute_uv=False))
                    for a, b in pairs(spec.children_of(name)[0], extra=name)
                ]
                # The element has moved the source's heads already: scored where they came from.
                undo = np.argsort(element[name])
                score = -sum(np.linalg.norm(a[:, None] - b[undo][None], axis=-1) for a, b in spectra)
                order = solve(score)
            else:
                score = sum(a @ np.swapaxes(b, -1, -2) for a, b in pairs(owned, extra=name))
                order = np.stack([solve(one) for one in score])
            if chosen(score, order) - chosen(score, element[owned]) > 1e-6 * abs(chosen(score, order)):
                element[owned], progress = order.astype(np.int32), True
                head_progress |= name in heads and phase == "heads"
        if phase == "heads" and not head_progress:
            phase = "inside"
        elif not progress:
            return sweep
    return max_sweeps


def loop_permutations(spec, target, source, *, max_sweeps, tolerance=1e-6):
    """The same coordinate ascent in plain NumPy and SciPy: every leaf of every group, every sweep, nothing kept.

    Heads by the exact score, one SciPy call per pair of heads. Returns the number of sweeps.
    """
    target, source = tree.flatten(target), tree.flatten(source)
    element = symmetry.identity(spec)
    matched = [path for path in spec.axes if path not in spec.unmatched]

    def moved(path, skip):
        return symmetry.element.apply_to_leaf(spec, element, path, source[path], skip_axes=skip)

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


def loop_dense(spec, target, source, *, max_sweeps):
    """The search over the whole group as it is, with SciPy's dense solver in the place of short lists."""
    standing, assignment.MIN_LISTED = assignment.MIN_LISTED, sys.maxsize
    try:
        return match_weights(
            jax.random.key(0), spec, target, source, **options_of("full"), max_sweeps=max_sweeps
        ).num_sweeps
    finally:
        assignment.MIN_LISTED = standing


LOOPS = {"weights": loop_permutations, "transfusion": loop_transfusion, "full": loop_dense}


def options_of(method):
    """What `transport` asks of the search by default."""
    defaults = TRANSPORTS["full"].options
    return {name: defaults[name] for name in ("head_cost", "weighting", "tolerance")} if method == "full" else {}


def spec_of(config, method):
    options = METHODS["transfusion"].spec_options if method == "transfusion" else {}
    return registry.symmetry_of(config, **options)


def draw_pair(config, case, method):
    """(target, source, planted element or None); for "full" both are folded."""
    spec, source, planted = spec_of(config, method), draw_tower(config, 0), None
    if case == "planted":
        planted = symmetry.random(jax.random.key(7), spec)
        if method == "transfusion":
            planted |= dict.fromkeys(spec.junctions, planted[spec.junctions[0]])
        target = add_noise(symmetry.apply(spec, planted, source), 0.1, 1)
    else:
        target = draw_tower(config, 2)
    if method == "full":
        target, source = (canonical.fold(spec, params, dtype=np.float32) for params in (target, source))
    return target, source, planted


def timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def megabytes(field):
    """Of /proc/self/status: "VmRSS" now, "VmHWM" at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(config, case, method, folder, *, loop_sweeps):
    """One row, in this process and no other, set up as by the command line; the networks lie in `folder`."""
    prepare_process()
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(1)))
    bare = megabytes("VmRSS")
    target, source = (tree.unflatten(dict(np.load(folder / f"{name}.npz"))) for name in ("target", "source"))
    spec, loaded = spec_of(config, method), megabytes("VmRSS")
    if method == "full":
        spec = canonical.canonical_spec(spec)
    match = METHODS["transfusion" if method == "transfusion" else "weights"].match
    row = {"row": f"{case}/{method}"}
    for run in ("first", "warm"):
        call = functools.partial(match, jax.random.key(0), spec, target, source, **options_of(method))
        seconds, result = timed(call)
        row[f"{run}_s"] = round(seconds, 2)
    row["sweeps"] = result.num_sweeps
    peak = megabytes("VmHWM")
    row |= {"peak_mb": round(peak), "over_bare_mb": round(peak - bare), "over_loaded_mb": round(peak - loaded)}
    if (folder / "planted.npz").exists():
        planted = dict(np.load(folder / "planted.npz"))
        orders = [n for n in planted if np.asarray(result.element[n]).dtype.kind == "i"]
        hits = [np.mean(np.asarray(result.element[n]) == planted[n]) for n in orders]
        row["recovered"] = round(float(np.mean(hits)), 4)
    if loop_sweeps:
        call = functools.partial(LOOPS[method], spec, target, source, max_sweeps=loop_sweeps)
        seconds, sweeps = timed(call)
        row |= {"loop_s": round(seconds, 2), "loop_sweeps": sweeps}
    print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("width", 768), ("depth", 12), ("heads", 12), ("hidden", 3072)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--loop-sweeps", type=int, default=2, help="stop the plain loop after so many; 0: leave it out")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # set by the parent for its one row
    arguments = parser.parse_args()
    config = vit.Config(
        image_size=224, patch_size=16, width=arguments.width, depth=arguments.depth, num_heads=arguments.heads,
        mlp_width=arguments.hidden, num_outputs=512,
    )  # fmt: skip
    if arguments.folder:
        case, method = arguments.rows[0].split("/")
        measure(config, case, method, arguments.folder, loop_sweeps=arguments.loop_sweeps)
        return
    print(json.dumps({
        "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "numpy": np.__version__, "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind, "platform": platform.machine(), "load": round(os.getloadavg()[0], 1),
    }), flush=True)  # fmt: skip
    for row in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            trees = dict(zip(("target", "source", "planted"), draw_pair(config, *row.split("/")), strict=True))
            for name, params in trees.items():
                if params is not None:
                    np.savez(Path(folder) / f"{name}.npz", **(params if name == "planted" else tree.flatten(params)))
            sizes = [f"--{name}={getattr(arguments, name)}" for name in ("width", "depth", "heads", "hidden")]
            rest = [f"--rows={row}", f"--folder={folder}", f"--loop-sweeps={arguments.loop_sweeps}", *sizes]
            subprocess.run([sys.executable, __file__, *rest], check=True)


if __name__ == "__main__":
    main()
