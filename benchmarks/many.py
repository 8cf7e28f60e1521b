"""21 models in one program beside a loop of 21 evaluations.

    python benchmarks/many.py [--models narrow,deep,perceptron] [--examples 512] [--rounds 7]

"loop" calls `evaluate_classifier` on one model after the other, warm, each a tree on the host; "loop, small batches"
does so with the batch size that the engine takes. "many" is `evaluate_many` over coefficients of one shared task
vector, "stacked" the same over 21 trees, "side by side" with all of them in one `vmap`. Rows run in turns, a round of
each after the other, so that background work hits all alike; a ratio is the median over rounds of loop seconds / row
seconds, "work" the same of processor seconds of all cores (on a CPU, least over rounds), which background work moves
little.

Measured 2026-11-21 on two idle CPU cores, jax 0.10.2; seconds, 5 rounds:

    model       row                      first  median     min     max   ratio    work
    narrow      loop                     0.816   0.406   0.395   0.424    1.00    1.00
    narrow      loop, small batches      0.908   0.503   0.485   0.527    0.82    0.78
    narrow      many                     1.003   0.216   0.213   0.217    1.87    1.47
    narrow      stacked                  1.110   0.219   0.212   0.239    1.80    1.45
    narrow      side by side             1.179   0.421   0.413   0.433    0.96    1.15
    deep        loop                     1.496   0.873   0.860   0.952    1.00    1.00
    deep        loop, small batches      1.633   1.220   1.187   1.381    0.71    0.80
    deep        many                     1.409   0.537   0.532   0.558    1.63    1.33
    deep        stacked                  1.531   0.548   0.543   0.577    1.58    1.30
    deep        side by side             2.060   1.119   1.096   1.230    0.77    0.97
    perceptron  loop                     0.154   0.032   0.030   0.034    1.00    1.00
    perceptron  loop, small batches      0.246   0.123   0.122   0.137    0.25    0.25
    perceptron  many                     0.310   0.016   0.014   0.017    1.88    2.18
    perceptron  stacked                  0.396   0.016   0.015   0.023    2.00    1.89
    perceptron  side by side             0.361   0.025   0.020   0.028    1.29    1.33

An accelerator is still to be measured.
"""

import argparse
import json
import os
import time

import jax
import numpy as np

from jaxtune.evaluate import evaluate_classifier
from jaxtune.evaluate.candidates import combine_candidates, stack_candidates
from jaxtune.evaluate.many import CPU_BATCH, DEVICE_BATCH, evaluate_many
from jaxtune.models import mlp, registry, vit
from jaxtune.sampling import Forward

NUM_MODELS = 21
IMAGES = dict(image_size=28, patch_size=7, channels=1, num_heads=4, num_outputs=10)
CONFIGS = {
    "narrow": vit.Config(**IMAGES, width=64, depth=2, mlp_width=128),  # that of the ladder of base pairs
    "deep": vit.Config(**IMAGES, width=64, depth=4, mlp_width=256),
    "perceptron": mlp.Config(image_shape=(28, 28, 1), widths=(64, 64), num_outputs=10),
}


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


def rows_of(config, source):
    """Name -> a function that gives the loss of every model."""
    base, vector = (jax.tree.map(np.asarray, registry.init(jax.random.key(n), config)) for n in (0, 1))
    scales = np.linspace(0, 0.5, NUM_MODELS).astype(np.float32)
    models = [jax.tree.map(lambda b, v, s=s: b + s * v, base, vector) for s in scales]
    combined, stacked = combine_candidates(base, [vector], scales[:, None]), stack_candidates(models)
    forward = Forward(config)
    small = CPU_BATCH if jax.default_backend() == "cpu" else DEVICE_BATCH

    def loop(**options):
        return [evaluate_classifier(config, model, source, **options).loss for model in models]

    def many(candidates, **options):
        return [metrics.loss for metrics in evaluate_many(candidates, forward, source, **options)]

    return {
        "loop": loop,
        "loop, small batches": lambda: loop(batch_size=small),
        "many": lambda: many(combined),
        "stacked": lambda: many(stacked),
        "side by side": lambda: many(combined, at_a_time=NUM_MODELS),
    }


def measure(rows, rounds):
    """Name -> (seconds, processor seconds) of every round; the first call, which compiles, apart."""
    first, seconds, found = {}, {name: [] for name in rows}, {}
    for number in range(rounds + 1):
        for name, row in rows.items():
            began = np.array([time.perf_counter(), time.process_time()])
            found[name] = row()
            took = np.array([time.perf_counter(), time.process_time()]) - began
            if number:
                seconds[name].append(took)
            else:
                first[name] = took[0]
    for name, losses in found.items():
        np.testing.assert_allclose(losses, found["loop"], rtol=1e-3, err_msg=name)
    return first, {name: np.array(took).T for name, took in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(CONFIGS))
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    source = Images(arguments.examples)
    print(json.dumps({
        "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "load": round(os.getloadavg()[0], 1),
    }))  # fmt: skip
    print(f"{'model':12s}{'row':22s}{'first':>8s}{'median':>8s}{'min':>8s}{'max':>8s}{'ratio':>8s}{'work':>8s}")
    for model in arguments.models.split(","):
        first, seconds = measure(rows_of(CONFIGS[model], source), arguments.rounds)
        for name, (took, worked) in seconds.items():
            values = (first[name], np.median(took), min(took), max(took))
            ratios = np.median(seconds["loop"][0] / took), min(seconds["loop"][1]) / min(worked)
            columns = [f"{x:8.3f}" for x in values] + [f"{x:8.2f}" for x in ratios]
            print(f"{model:12s}{name:22s}" + "".join(columns), flush=True)


if __name__ == "__main__":
    main()
