"""Memory of gradients of single examples: what a chunk takes, what the number of examples does not, method by method.

    python benchmarks/gradients.py [--width 768] [--depth 2]

Part one asks the compiler about the program of one chunk. Part two runs each method in a process of its own and reports
its peak over that of a process that loads the same networks and does nothing.

Measured 2026-11-21 on two CPU cores shared with much other work (so no seconds), jax 0.10.2; in trees like the
parameters (54.7 MiB, width 768, depth 2):

    examples in the chunk          1       4      16
    votes                        0.6     1.8     6.3
    Fisher                       1.6     5.3    20.0
    summed gradient              0.6     0.7     1.4

    peak of a process over one that holds the three networks     16 examples    64 examples
    gradfix (8 examples a chunk)                                        10.1           10.7
    distill (one rate, batches of 16)                                   20.3
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.data import ArraySource
from jaxtune.evaluate.fisher import FisherKernel, estimate_fisher
from jaxtune.gradients import ExampleGradients, LabelLoss, SummedGradient, add_chunk, sum_signs
from jaxtune.models import registry, vit
from jaxtune.sampling import make_sample
from jaxtune.transport.prepared import apply_transport
from jaxtune.transport.registry import METHODS, prepare_transport

CHUNKS = (1, 4, 16)


def config_of(width, depth):
    return vit.Config(
        image_size=32, patch_size=8, width=width, depth=depth, num_heads=8, mlp_width=4 * width, num_outputs=10
    )


def draw_sample(config, count):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    names = tuple(f"class {n}" for n in range(10))
    return make_sample(config, ArraySource("noise", "train", images, np.arange(count) % 10, names))


def draw_networks(config):
    """(old base, its fine-tune, new base)."""
    old, change, new = (jax.tree.map(np.asarray, registry.init(jax.random.key(n), config)) for n in range(3))
    return old, tree.map_leaves(lambda _, a, b: a + np.float32(0.1) * b, old, change), new


def chunk_memory(config):
    """Bytes beside arguments and results of the program of one chunk, in trees like the parameters."""
    sample = draw_sample(config, max(CHUNKS))
    shapes = jax.eval_shape(lambda key: registry.init(key, config), jax.random.key(0))
    moving = tree.flatten(shapes)
    size = 4 * tree.count_parameters(shapes)
    loss = LabelLoss(sample.forward)
    kernels = {
        "votes": ExampleGradients(loss, sum_signs),
        "Fisher": FisherKernel(sample.forward, "exact"),
        "summed gradient": SummedGradient(loss),
    }
    print(f"{size / 2**20:.1f} MiB of parameters; memory of one chunk beside arguments and results, in trees like them")
    print(f"{'examples in the chunk':24}" + "".join(f"{count:>8}" for count in CHUNKS))
    for name, kernel in kernels.items():
        row = []
        for count in CHUNKS:
            chunk = next(sample.chunks(count))
            total = jax.eval_shape(kernel, moving, {}, None, chunk)
            compiled = add_chunk.lower(kernel, moving, {}, None, total, chunk).compile()
            row.append(compiled.memory_analysis().temp_size_in_bytes / size)
        print(f"{name:24}" + "".join(f"{value:8.1f}" for value in row), flush=True)


def run_one(config, method, count):
    """Peak of this process in bytes, and seconds; run alone."""
    sample, networks = draw_sample(config, count), draw_networks(config)
    begin = time.perf_counter()
    if method == "fisher":
        estimate_fisher(networks[1], sample)
    elif method != "nothing":
        data = {} if METHODS[method].data == "none" else {"sample": sample}
        symmetry = partial(registry.symmetry_of, config)
        prepared = prepare_transport(jax.random.key(0), symmetry, *networks, method=method, **data)
        jax.block_until_ready(jax.tree.map(jnp.asarray, apply_transport(prepared, networks[2])))
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - begin]))


def peak_of(arguments, method, count):
    words = [
        "--width",
        str(arguments.width),
        "--depth",
        str(arguments.depth),
        "--method",
        method,
        "--count",
        str(count),
    ]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--method")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--methods", nargs="*")
    arguments = parser.parse_args()
    config = config_of(arguments.width, arguments.depth)
    if arguments.method:
        run_one(config, arguments.method, arguments.count)
        return
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    chunk_memory(config)
    size = 4 * tree.count_parameters(jax.eval_shape(lambda key: registry.init(key, config), jax.random.key(0)))
    nothing, _ = peak_of(arguments, "nothing", 16)
    print(f"peak over a process that holds the three networks ({nothing / 2**20:.0f} MiB), in trees like one")
    print(f"{'method':24}{'16 examples':>14}{'64 examples':>14}{'seconds of 16':>16}")
    methods = arguments.methods or ["fisher", *(name for name, method in METHODS.items() if method.data != "none")]
    for method in methods:
        (few, seconds), (many, _) = (peak_of(arguments, method, count) for count in (16, 64))
        print(f"{method:24}{(few - nothing) / size:14.1f}{(many - nothing) / size:14.1f}{seconds:16.1f}", flush=True)


if __name__ == "__main__":
    main()
