"""Wall time and memory of `jaxtune merge`, beside mergekit and beside reading the inputs and copying one output.

    python benchmarks/merge.py [--rows linear ties ...] [--repeats 3] [--folder DIR] [--without-mergekit]

A base and two fine-tunes of a Llama-shaped model (hidden 1536, 18 layers, MLP 4096, 32,000 words: 608 M weights,
1.2 GB each in bfloat16, three files), made here from seeds; warm page cache. Every run is a process of its own, from
its start to its end, the three side by side in turns. The floor is `cat` of all inputs but one and `cp` of that one.
Memory is the most that a process held beside mapped files, looked up fifty times a second.

Measured 2026-11-21 on two CPU cores, numpy 2.4.6, mergekit 0.1.5 with torch 2.13; seconds, the middle one of three runs
in the first five rows, one run in the others; memory in MiB:

    row                floor  jaxtune  mergekit  jaxtune / floor  mergekit / jaxtune  memory  theirs
    linear              0.54     1.21       6.5             2.3                 5.4      83    1794
    slerp               0.44     1.68      11.3             3.8                 6.7      83    1494
    task_arithmetic     0.64     1.24       6.9             1.9                 5.6      83    1782
    model_stock         0.60     2.03       7.0             3.4                 3.5      84    1910
    dare_ties           0.60     4.10      23.0             6.8                 5.6     107    1854
    breadcrumbs         0.61     4.08      75.1             6.7                18.4     105    1645
    della               0.63     8.49      80.7            13.6                 9.5     110    1973
    sce                 0.61     4.82     141.0             7.9                29.2      94    2294
    ties                0.85    12.57     171.5            14.8                13.6      93    1801

Of the last row the cores were shared with other work: of it only the ratio of the two counts.

Of every run of ours 0.3 s were the start, 0.3 s that the files are on the disk before they get their names (the others
do not wait for that), and 0.02 s a sample of the inputs for their checksums.

What a block of 65,536 elements of dare_ties takes before the merge, least of many, in microseconds: 306, of which
random bits of two models are 136, reading, widening and differences 65, masks as weights 29, sums 24. Blocks half as
long took 9 % longer (model_stock: 31 %), twice as long 4 % less (model_stock: 5 % more).
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml

from jaxtune.checkpoint import safetensors

HIDDEN, LAYERS, MLP, WORDS, SHARDS = 1536, 18, 4096, 32000, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
    "num_hidden_layers": LAYERS, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": WORDS,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
TASK = {"density": 0.2, "weight": 0.5}
# Row -> method, what each model has, what all have, and whether the first model is the base alone.
ROWS = {
    "linear": ("linear", {"weight": 0.5}, {}, False),
    "slerp": ("slerp", {}, {"t": 0.4}, True),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.5}, {}, True),
    "model_stock": ("model_stock", {}, {}, True),
    "dare_ties": ("dare_ties", TASK, {}, True),
    "breadcrumbs": ("breadcrumbs", TASK, {}, True),
    "della": ("della", TASK, {}, True),
    "sce": ("sce", {}, {"select_topk": 0.2}, True),
    "ties": ("ties", TASK, {}, True),
    "ties over the whole model": ("ties", TASK, {"scope": "model"}, True),
}
MERGEKIT_LACKS = {"ties over the whole model"}


def make_models(folder):
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (HIDDEN, MLP)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}
    names = list(shapes)
    parts = [names[n * len(names) // SHARDS : (n + 1) * len(names) // SHARDS] for n in range(SHARDS)]
    for seed, model in enumerate(("base", "a", "b")):
        if (folder / model).exists():
            continue
        made = folder / f".{model}"
        made.mkdir(parents=True)
        files = {f"model-{n + 1:05d}-of-{SHARDS:05d}.safetensors": part for n, part in enumerate(parts)}
        for file, part in files.items():
            header = safetensors.make_header({name: Info(shapes[name]) for name in part}, {"format": "pt"})
            header.write(made / file, lambda name, seed=seed: draw(name, shapes[name], seed))
        weight_map = {name: file for file, part in files.items() for name in part}
        total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (made / "model.safetensors.index.json").write_text(json.dumps(index))
        (made / "config.json").write_text(json.dumps(CONFIG))
        made.rename(folder / model)


class Info:
    dtype = np.dtype(ml_dtypes.bfloat16)

    def __init__(self, shape):
        self.shape = shape


def draw(name, shape, seed):
    base = np.random.default_rng(sum(name.encode()) * 1000 + len(name)).standard_normal(shape, np.float32)
    base *= np.float32(0.02)
    if seed:
        base += np.float32(0.002) * np.random.default_rng([seed, len(name)]).standard_normal(shape, np.float32)
    return base.astype(ml_dtypes.bfloat16)


def write_recipe(folder, row):
    method, own, shared, has_base = ROWS[row]
    names = ["a", "b"] if row != "slerp" else ["base", "a"]
    recipe = {"merge_method": method, "dtype": "bfloat16"}
    recipe["models"] = [{"model": str(folder / name), **({"parameters": own} if own else {})} for name in names]
    if has_base:
        recipe["base_model"] = str(folder / "base")
    if shared:
        recipe["parameters"] = shared
    path = folder / f"{row.replace(' ', '_')}.yml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path, [*dict.fromkeys([*(["base"] if has_base else []), *names])]


def time_floor(folder, models):
    out = folder / "out_floor"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    began = time.perf_counter()
    for model in models[1:]:
        with open(os.devnull, "wb") as nowhere:
            subprocess.run(
                ["cat", *map(str, sorted((folder / model).glob("*.safetensors")))], stdout=nowhere, check=True
            )
    subprocess.run(["cp", *map(str, sorted((folder / models[0]).glob("*.safetensors"))), str(out)], check=True)
    return time.perf_counter() - began, 0


def time_command(command, out):
    shutil.rmtree(out, ignore_errors=True)
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None:
        peak = max(peak, own_memory(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{command}: exit code {process.returncode}\n{process.stdout.read().decode()[-2000:]}")
    return seconds, peak


def own_memory(pid):
    """Of a process and all that it forked; what they still share is counted for each."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
    return own + sum(map(own_memory, children))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "jaxtune-merge-benchmark")
    parser.add_argument("--without-mergekit", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make_models(arguments.folder)
    tools = Path(sys.executable).parent
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, numpy {np.__version__}")
    print(
        f"{'row':27}{'floor':>8}{'jaxtune':>9}{'mergekit':>10}{'/ floor':>9}{'mergekit /':>12}{'MiB':>7}{'theirs':>8}"
    )
    results = {}
    for row in arguments.rows:
        recipe, models = write_recipe(arguments.folder, row)
        has_mergekit = not arguments.without_mergekit and row not in MERGEKIT_LACKS
        runs = {"floor": lambda models=models: time_floor(arguments.folder, models)}
        ours = [str(tools / "jaxtune"), "merge", str(recipe), "--out"]
        runs["jaxtune"] = lambda ours=ours: time_command(ours, arguments.folder / "out_jaxtune")
        if has_mergekit:
            theirs = [str(tools / "mergekit-yaml"), str(recipe), "--lazy-unpickle", "--no-copy-tokenizer", "--quiet"]
            runs["mergekit"] = lambda theirs=theirs: time_command(theirs, arguments.folder / "out_mergekit")
        found = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                found[name].append(run())
        seconds = {name: [one for one, _ in values] for name, values in found.items()}
        memory = {name: max(peak for _, peak in values) / 2**20 for name, values in found.items()}
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        results[row] = {"seconds": seconds, "own_memory_mib": memory}
        theirs = middle.get("mergekit", float("nan"))
        print(
            f"{row:27}{middle['floor']:8.2f}{middle['jaxtune']:9.2f}{theirs:10.1f}"
            f"{middle['jaxtune'] / middle['floor']:9.2f}{theirs / middle['jaxtune']:12.1f}"
            f"{memory['jaxtune']:7.0f}{memory.get('mergekit', float('nan')):8.0f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
