"""A sweep of 21 scales as one program beside 21 evaluations, and how long the program takes to start.

    python benchmarks/sweep.py [--examples 512] [--repeats 5]

A ViT of width 64 and depth 4 on 28 x 28 images; every call is warm and reads its results. "one" is
`evaluate_scales`, whose one program takes the scales in turns on a CPU; "vmapped" is the same with all 21 side by
side; "many" makes and evaluates one model at a time, compiled once.

Measured 2026-11-21 on two CPU cores, background work paused, jax 0.10.2; medians of 5, seconds:

    row        median    min    max    first
    one         1.143  1.119  1.429    3.212
    vmapped     2.057  2.027  2.294    3.249
    many        1.279  1.266  1.490    1.895
    import      0.025  0.025  0.025
    help        0.039  0.039  0.039

One program is 1.12 times as fast as 21 evaluations. Side by side the models are slower on a CPU, presumably because
their weights and activations no longer fit into its caches.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np

from jaxtune.evaluate import evaluate_classifier, evaluate_scales
from jaxtune.models import registry, vit
from jaxtune.transport.prepared import Prepared, apply_transport

SCALES = np.linspace(0, 2, 21)


class Images:
    """Noise with labels, as a data source."""

    def __init__(self, num_examples):
        draw = np.random.default_rng(0)
        self.images = draw.normal(size=(num_examples, 28, 28, 1)).astype(np.float32)
        self.labels = draw.integers(0, 10, num_examples).astype(np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return {"image": self.images[indices], "label": self.labels[indices]}


def median_of(function, repeats):
    """Median, least and greatest seconds after one call that compiles; that one too."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    first, *warm = seconds
    return {name: round(float(x), 4) for name, x in (
        ("median_s", np.median(warm)), ("min_s", min(warm)), ("max_s", max(warm)), ("first_s", first)
    )}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = vit.Config(
        image_size=28, patch_size=7, channels=1, width=64, depth=4, num_heads=4, mlp_width=256, num_outputs=10
    )
    target, other = (registry.init(jax.random.key(n), config) for n in (0, 1))
    target, other = (jax.tree.map(np.asarray, params) for params in (target, other))
    prepared, source = Prepared(other, registry.symmetry_of(config)), Images(arguments.examples)

    def one(**options):
        return evaluate_scales(config, prepared, target, source, SCALES, batch_size=arguments.batch_size, **options)

    def many():
        return [
            evaluate_classifier(
                config, apply_transport(prepared, target, scale), source, batch_size=arguments.batch_size
            )
            for scale in SCALES
        ]

    def vmapped():
        return one(at_a_time=len(SCALES))

    rows = {f.__name__: median_of(f, arguments.repeats) for f in (one, vmapped, many)}
    for swept, single in zip(one(), many(), strict=True):
        assert abs(swept.loss - single.loss) < 1e-3 * single.loss
    for name, command in (("import", ["-c", "import jaxtune"]), ("help", ["-m", "jaxtune", "--help"])):
        run = [sys.executable, *command]
        rows[name] = median_of(lambda run=run: subprocess.run(run, check=True, stdout=subprocess.DEVNULL), 5)
    print(json.dumps({
        "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind, "load": round(os.getloadavg()[0], 1),
    }))  # fmt: skip
    for name, row in rows.items():
        print(json.dumps({"row": name, **row}))
    print(json.dumps({"ratio": round(rows["many"]["median_s"] / rows["one"]["median_s"], 2)}))


if __name__ == "__main__":
    main()
