"""Spectral merges beside plain NumPy loops of the same methods, full SVDs as released, in the same run.

    python benchmarks/spectral.py [--tasks 8] [--repeats 3] [--methods tsv_m iso_c]

Eight float32 task vectors of the matrices of a block of ViT-B (four of 768 x 768, two of 768 x 3072), a decaying
spectrum over noise of full rank. Ours computes in float64, the loops in float32. "ours" merges a leaf a worker, as many
as cores; all but "loop, default" have one LAPACK thread. Error: of the updates, largest of the six, loop's included.

Measured 2026-11-21 on two CPU cores that had eight other processes to serve, nice 10, numpy 2.4.6, scipy 1.17.1;
medians of three, seconds:

    method  ours  1 worker  loop, 1 thread  loop, default   ratios    processor: ours   loop   error  MiB
    tsv_m  44.87     23.57           75.08          80.59  1.7  1.8              5.36  18.51   2e-06  538
    iso_c   2.46      2.07            5.22           5.41  2.1  2.2              1.02   2.05   1e-06   32

Processor time is what to compare here (3.5 and 2.0 times less); two workers gain nothing where no core is free. What is
left is one `eigh` a task (TSV-M) or a matrix (Iso-C): of 768 x 768 it takes 0.07 s of the processor where the loop's
float32 SVD takes 0.19 s, 0.64 s for 768 x 3072. A fifth of the loop is reached by TSV-M for 768 x 3072 alone (4.9
and 5.2 times less in two runs; 768 x 768: 2.5).

Tried on 768 x 768, least of several runs, seconds of the processor: the 96 strongest vectors take 0.051 in float64 and
0.026 in float32, whose digits do not tell them from the next (their squares differ by 0.9 %, at 0.0045 of the largest);
all of them take 0.066 and 0.067. The polar factor of a sum of eight tasks (condition 5,600) takes 0.12 by `eigh`, 0.78
by Newton-Schulz in float64, 0.21 in float32.
"""

import argparse
import functools
import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: threads slow small factorisations down

import numpy as np
import scipy

from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS

BLOCK = {(768, 768): 4, (768, 3072): 2}  # the matrices of a block of ViT-B


def draw_models(shape, num_tasks, seed=0):
    """float32 base and fine-tunes: task vectors of a decaying spectrum over noise of full rank."""
    draw = np.random.default_rng(seed)
    base = draw.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
    models = []
    for _ in range(num_tasks):
        rank = 128
        left, right = draw.standard_normal((shape[0], rank), np.float32), draw.standard_normal((rank, shape[1]))
        decay = np.arange(1, rank + 1, dtype=np.float32) ** -0.7
        delta = 1e-4 * (left * decay) @ right.astype(np.float32) + 1e-4 * draw.standard_normal(shape, np.float32)
        models.append(base + delta.astype(np.float32))
    return base, models


def tsv_m_by_loop(base, models):
    rank = min(base.shape)
    kept = rank // len(models)
    lefts, values, rights = [], [], []
    for model in models:
        left, value, right = np.linalg.svd(model - base, full_matrices=False)
        lefts.append(left[:, :kept])
        values.append(value[:kept])
        rights.append(right[:kept])
    left, _, right = np.linalg.svd(np.hstack(lefts), full_matrices=False)
    other_left, _, other_right = np.linalg.svd(np.vstack(rights), full_matrices=False)
    return base + ((left @ right) * np.concatenate(values)) @ (other_left @ other_right)


def iso_c_by_loop(base, models):
    left, values, right = np.linalg.svd(sum(model - base for model in models), full_matrices=False)
    return base + (left * values.mean()) @ right


LOOPS = {"tsv_m": tsv_m_by_loop, "iso_c": iso_c_by_loop}


def run_ours(name, base, models):
    merged = merge_trees(METHODS[name], [{"w": model} for model in models], {"w": base}, input_axis=-1)
    return merged["w"]


def run_block(merge, inputs, workers):
    """(results, wall seconds, processor seconds) of all matrices of a block."""
    wall, processor = time.perf_counter(), time.process_time()
    if workers == 1:
        results = [merge(*one) for one in inputs]
    else:
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(lambda one: merge(*one), inputs))
    return results, time.perf_counter() - wall, time.process_time() - processor


def draw_block(num_tasks):
    shapes = [shape for shape, count in BLOCK.items() for _ in range(count)]
    return [draw_models(shape, num_tasks, seed) for seed, shape in enumerate(shapes)]


def time_default_loop(name, parsed):
    """Seconds of the loop in a process whose NumPy has as many threads as it likes."""
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    command = [sys.executable, __file__, "--loop", name, "--tasks", str(parsed.tasks)]
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(answer.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--loop", choices=list(LOOPS), help="time this loop alone and print the seconds")
    parsed = parser.parse_args()
    inputs = draw_block(parsed.tasks)
    if parsed.loop:
        print(run_block(LOOPS[parsed.loop], inputs, 1)[1])
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, scipy {scipy.__version__}")
    print("method  seconds: ours  1 worker  loop, 1 thread  loop, default   ratios  processor: ours   loop  error  MiB")
    for name in parsed.methods:
        ours = functools.partial(run_ours, name)
        for base, models in inputs[:: len(inputs) - 1]:  # imports and first calls
            ours(base[:64, :64], [model[:64, :64] for model in models])
        times, more = np.zeros((parsed.repeats, 6)), 0.0
        for repeat in range(parsed.repeats):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            merged, times[repeat, 0], _ = run_block(ours, inputs, os.cpu_count())
            more = max(more, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
            _, times[repeat, 1], times[repeat, 4] = run_block(ours, inputs, 1)
            expected, times[repeat, 2], times[repeat, 5] = run_block(LOOPS[name], inputs, 1)
            times[repeat, 3] = time_default_loop(name, parsed)
        error = max(
            np.linalg.norm(found - loop) / np.linalg.norm(loop - base)
            for found, loop, (base, _) in zip(merged, expected, inputs, strict=True)
        )
        pool, one, loop, default, processor, processor_loop = np.median(times, axis=0)
        print(
            f"{name:6} {pool:14.2f} {one:9.2f} {loop:15.2f} {default:14.2f} {loop / pool:5.1f} {default / pool:4.1f} "
            f"{processor:16.2f} {processor_loop:6.2f}   {error:.0e} {more:4.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
