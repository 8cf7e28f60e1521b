"""Peak memory of `jaxtune transport` beside what `--plan` says, for towers that are held in memory as a whole.

    python benchmarks/plan.py FOLDER [--width 512 --depth 8 --hidden 2048] [--methods identity permutation ...]

Three ViTs of random weights in float32 (an old base, its fine-tune, a base from another seed), and one transport a
method in a process of its own. "copies" is the peak over runtime and files, in units of the weights in float32: what
`commands.transport_plan.COPIES` bounds.

Measured 2026-11-21 on two CPU cores shared with other work (so no seconds), jax 0.10.2, 26 M weights; MiB:

    method             weights   peak   copies
    identity                99   1383      5.9
    orthogonal_shift        99   1482      6.9
    permutation             99   1721      9.3
    transfusion             99   1728      9.4
    full                    99   2165     13.8
    auto                    99   2484     17.0

With --width 768 --depth 12 --heads 12 --hidden 3072, 86 M weights: permutation 3700, which are 6.7 copies. Part of the
runtime counts as copies of a small model, so the plan is too high rather than too low for larger ones.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

import jaxtune as jt
from jaxtune import tree
from jaxtune.commands.transport_plan import RUNTIME_BYTES
from jaxtune.models import registry, vit
from jaxtune.transport.registry import without_data


def write_models(folder, config):
    """Old base, fine-tune and new base; those that are there already are kept."""
    draw = np.random.default_rng(0)

    def tune(_, leaf):
        leaf = np.asarray(leaf)
        return leaf + np.float32(0.02 * leaf.std()) * draw.standard_normal(leaf.shape, np.float32)

    def init(seed):
        return tree.map_leaves(lambda _, leaf: np.asarray(leaf), registry.init(jax.random.key(seed), config))

    recipes = {"old": lambda: init(0), "tuned": lambda: tree.map_leaves(tune, init(0)), "new": lambda: init(1)}
    for name, recipe in recipes.items():
        if not (folder / name).exists():
            jt.save(folder / name, recipe(), config=registry.config_to_dict(config))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    for name, size in {"width": 512, "depth": 8, "heads": 8, "hidden": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--methods", nargs="*", default=without_data(), choices=without_data())
    arguments = parser.parse_args()
    config = vit.Config(
        image_size=224, patch_size=16, width=arguments.width, depth=arguments.depth, num_heads=arguments.heads,
        mlp_width=arguments.hidden, num_outputs=512,
    )  # fmt: skip
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_models(arguments.folder, config)
    models = {role: arguments.folder / name for role, name in
              (("source", "old"), ("finetuned", "tuned"), ("target", "new"))}  # fmt: skip
    weights = 4 * sum(leaf.size for leaf in tree.flatten(jt.load(models["source"]).params).values())
    for method in arguments.methods:
        out = arguments.folder / f"out_{method}"
        command = [sys.executable, "-m", "jaxtune", "transport", f"--method={method}", f"--out={out}", "--overwrite"]
        command += [f"--{role}={path}" for role, path in models.items()]
        plan = subprocess.run([*command, "--plan"], check=True, capture_output=True, text=True).stdout
        subprocess.run(command, check=True, capture_output=True)
        cost = json.loads((out / "report.json").read_text())["cost"]
        print(json.dumps({
            "method": method,
            "weights_mib": round(weights / 2**20),
            "plan": re.search(r"at most about\s+(\S+ \S+)", plan).group(1),
            "peak_mib": round(cost["peak_memory_bytes"] / 2**20),
            "copies": round((cost["peak_memory_bytes"] - RUNTIME_BYTES - 3 * weights) / weights, 1),
            "seconds": cost["seconds"]["total"],
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
