"""Peak memory and time of transporting a fine-tune between decoders larger than memory would allow three times.

    python benchmarks/memory.py FOLDER [--depth 32] [--method permutation]

Writes three synthetic Llama-like decoders in bfloat16 into FOLDER (old base, a fine-tune, and the old base moved by a
random element with 10 % noise), 3.1 GB each by default, and runs `jaxtune transport` on them in a process of its own.

Measured 2026-11-21 on two CPU cores shared with other work, jax 0.10.2:

    method        weights        stored, each   --plan says   peak of the process   seconds   exact   residual, found
    permutation   1.54 billion       2.87 GiB       2.7 GiB              1.72 GiB       491     yes             0.092
    full          0.84 billion       1.55 GiB       1.8 GiB              1.22 GiB      1138     yes             0.100

full: --width 1024 --depth 68 --heads 16 --mlp 2816 --method full, at low priority with half a core of the two.
A network of either size would be 5.7 and 3.1 GiB in float32 alone.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

import jaxtune as jt
from jaxtune import symmetry, tree
from jaxtune.lazy import LazyLeaf
from jaxtune.models import decoder, registry
from jaxtune.rng import named_key


def draw(key, path, shape, centre, spread):
    return centre + np.float32(spread) * np.asarray(jax.random.normal(named_key(key, path), shape, np.float32))


def as_stored(params):
    return tree.map_leaves(
        lambda _, leaf: np.asarray(leaf, ml_dtypes.bfloat16), params, dtype=lambda *_: ml_dtypes.bfloat16
    )


def make_base(config, seed):
    """Gaussian weights scaled by fan-in, made leaf by leaf when they are written."""
    key = jax.random.key(seed)
    shapes = jax.eval_shape(lambda k: registry.init(k, config), key)

    def leaf(path, shape):
        is_gain = path.endswith("scale")
        spread = 0.1 if is_gain else 1 / np.sqrt(np.prod(shape.shape[:-1] if "out/" in path else shape.shape[:1]))
        return LazyLeaf(shape.shape, np.float32, lambda: draw(key, path, shape.shape, np.float32(is_gain), spread))

    return tree.map_leaves(leaf, shapes)


def add_noise(params, share, seed):
    key = jax.random.key(seed)

    def add(path, leaf):
        leaf = np.asarray(leaf, np.float32)
        return leaf + draw(key, path, leaf.shape, np.float32(0), share * leaf.std())

    return tree.map_leaves(add, params, dtype=lambda *_: np.float32)


def write_models(folder, config):
    """The three checkpoints; those that are there already are kept."""
    values, spec = registry.config_to_dict(config), registry.symmetry_of(config)
    recipes = {
        "old": lambda: make_base(config, 0),
        "tuned": lambda: add_noise(jt.load(folder / "old", lazy=True).params, 0.02, 1),
        "new": lambda: add_noise(
            symmetry.apply(spec, symmetry.random(jax.random.key(2), spec), jt.load(folder / "old", lazy=True).params),
            0.1, 3,
        ),
    }  # fmt: skip
    for name, recipe in recipes.items():
        if not (folder / name).exists():
            jt.save(folder / name, as_stored(recipe()), config=values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    sizes = {"width": 2048, "depth": 32, "heads": 32, "kv_heads": 4, "mlp": 5632, "vocab": 32000}
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--method", default="permutation")
    arguments = parser.parse_args()
    config = decoder.Config(
        vocab_size=arguments.vocab, width=arguments.width, depth=arguments.depth, num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads, head_width=arguments.width // arguments.heads, mlp_width=arguments.mlp,
        activation="silu", gated=True, norm="rms", qkv_bias=False, out_bias=False, mlp_bias=False,
        rotary=decoder.Rotary(theta=10000.0),
    )  # fmt: skip
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_models(arguments.folder, config)
    out = arguments.folder / f"out_{arguments.method}"
    paths = [f"--{role}={arguments.folder / name}" for role, name in
             (("source", "old"), ("finetuned", "tuned"), ("target", "new"), ("out", out.name))]  # fmt: skip
    began = time.perf_counter()
    command = [sys.executable, "-m", "jaxtune", "transport", *paths, f"--method={arguments.method}", "--overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text())
    stored = sum(file.stat().st_size for file in (arguments.folder / "old").glob("*.safetensors"))
    print(json.dumps({
        "method": arguments.method,
        "model_gib": round(stored / 2**30, 2),
        "peak_gib": round(report["cost"]["peak_memory_bytes"] / 2**30, 2),
        "seconds": round(time.perf_counter() - began),
        "stages": report["cost"]["seconds"],
        "residual": report["evidence"]["residual"],
        "is_exact": report["equivalence"] and report["equivalence"]["is_exact"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
