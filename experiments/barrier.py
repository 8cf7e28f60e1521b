"""How high the loss climbs between two networks of other seeds, after every alignment: vision and language.

    python -m experiments.barrier --config=configs/barrier.py --workdir=runs/barrier --config.data_dir=DIR

25 points of the line on test records, the worst of them counts. Alignments that look at inputs are given train records
without labels. Leaves checkpoints/, measured/, barrier.json and barrier.md; the same command goes on.
"""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import jaxtune
from experiments.command import run_main
from experiments.fitting import check_fields
from experiments.rungs.networks import CHUNK, Networks, Schedule
from experiments.sources import open_joined, open_task
from experiments.workdir import CHECKPOINTS_NAME, Workdir
from jaxtune.align.registry import METHODS
from jaxtune.data import Loader, take_half, take_sample
from jaxtune.errors import NonFiniteError
from jaxtune.evaluate.candidates import line_candidates
from jaxtune.evaluate.language import evaluate_texts
from jaxtune.evaluate.many import evaluate_many
from jaxtune.interpolate.barrier import NUM_POINTS, measure_barrier
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.sample import Sample, example_losses
from jaxtune.sampling import Forward, make_sample, make_text_sample
from jaxtune.symmetry import canonical
from jaxtune.train.optimizer import make_optimizer, make_schedule

FIELDS = (
    "seed",
    "data_dir",  # put before every data name that is a file
    "networks",  # folder of vision bases of a ladder; "": checkpoints/ in the workdir
    "num_pairs",
    "vision",  # name -> {"model", "learning_rate", "sources", "num_steps", "batch_size"}
    "language",  # name -> {"model", "learning_rate", "data", "num_steps", "batch_size"}
    "alignments",  # name -> {"method": of `jaxtune methods`, "options": {...}, "num_inputs": 0 where it sees none}
    "num_test",
)


def measure(config: ml_collections.ConfigDict, path: Path, overrides: Sequence[str] = ()) -> int | None:
    """Trains what is missing and measures every line."""
    check_fields(config, FIELDS)
    plain = config.to_dict()
    workdir = Workdir(path, plain, overrides=overrides, parents={}, seeds={"seed": config.seed})
    rows = []
    for kind in ("vision", "language"):
        for name, row in plain[kind].items():
            model = registry.config_from_dict(row["model"])
            inputs, test, bases = (_vision if kind == "vision" else _language)(name, row, model, plain, path)
            for index in range(config.num_pairs):
                for alignment, how in {"as they lie": None, **plain["alignments"]}.items():
                    file = path / "measured" / f"{name}_{index}_{alignment.replace(' ', '_')}.json"
                    if not file.exists():
                        print(f"{name}, pair {index}: {alignment}", file=sys.stderr, flush=True)
                        pair = bases(index), bases((index + 1) % config.num_pairs)
                        found = _measure(model, pair, how, inputs, test, seed=config.seed + index)
                        workdir.keep_measured(file, {"model": name, "index": index, "alignment": alignment, **found})
                    rows.append(json.loads(file.read_text()))
            jax.clear_caches()
    workdir.publish_text("barrier.json", json.dumps({"config": plain, "rows": rows}, indent=1, allow_nan=False) + "\n")
    page = render_page(plain, rows)
    workdir.publish_text("barrier.md", page)
    print(page)
    return None


def _vision(name, row, model, plain, path):
    """(inputs to align on, test sample, index -> base): the bases are those of the ladder's rung of other seeds."""
    where = {"data_dir": plain["data_dir"]}
    train, test = (open_joined(row["sources"], split, **where) for split in ("train", "test"))
    train = take_half(train, 0)
    networks = Networks(model, Path(plain["networks"] or path / CHECKPOINTS_NAME) / name)
    schedule = Schedule(row["num_steps"], row["learning_rate"], row["batch_size"])

    def base(index):
        seed = plain["seed"] + index
        start = partial(_init, model, seed)
        return networks.train(f"base_{index}", start, train, schedule, seed=seed)

    most = max((how["num_inputs"] for how in plain["alignments"].values()), default=0)
    inputs = make_sample(model, train, num_examples=max(most, 1), seed=plain["seed"]).without_labels()
    return inputs, make_sample(model, take_sample(test, plain["num_test"])), base


def _language(name, row, model, plain, path):
    where = {"data_dir": plain["data_dir"]}
    train, test = (open_task(row["data"], split, **where) for split in ("train", "test"))
    networks = Networks(model, path / CHECKPOINTS_NAME / name)

    def base(index):
        seed = plain["seed"] + index
        return networks.get(f"base_{index}", lambda: _train_language(model, train, row, seed))

    most = max((how["num_inputs"] for how in plain["alignments"].values()), default=0)
    inputs = make_text_sample(model, take_sample(train, max(most, 1), seed=plain["seed"]))
    return inputs, make_text_sample(model, take_sample(test, plain["num_test"])), base


def _init(model, seed):
    return registry.init(named_key(jax.random.key(seed), "init"), model)


def _train_language(model, source, row, seed):
    """A language model from its first weights: AdamW, warm-up over a tenth, cosine to a twentieth."""
    print(f"training a language model, seed {seed}", file=sys.stderr, flush=True)
    num_steps = row["num_steps"]
    rate = make_schedule(row["learning_rate"], num_steps, num_warmup_steps=max(1, num_steps // 10), final_fraction=0.05)
    optimizer = make_optimizer(rate, weight_decay=0.05)
    forward = Forward(model, is_next_token=True)

    def step(carry, text):
        params, state = carry

        def loss_of(params):
            return jnp.mean(example_losses(forward(params, {"text": text}), {"label": text[:, 1:]}))

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @partial(jax.jit, donate_argnums=(0, 1))
    def chunk(params, state, texts):
        (params, state), losses = jax.lax.scan(step, (params, state), texts)
        return params, state, losses[-1]

    params = _init(model, seed)
    state, loss = jax.jit(optimizer.init)(params), 0.0
    batches = iter(Loader(source, row["batch_size"], seed=seed))
    for begin in range(0, num_steps, CHUNK):
        taken = [batch["text"] for batch in itertools.islice(batches, min(CHUNK, num_steps - begin))]
        params, state, loss = chunk(params, state, np.stack(taken))
    if not np.isfinite(loss):
        raise NonFiniteError("training diverged. Lower the learning rate.")
    return params


def _measure(model, pair, how, inputs: Sample, test: Sample, *, seed) -> dict[str, Any]:
    """The barrier between two bases, the first one aligned; seconds that the alignment took."""
    source, target = pair
    began = time.perf_counter()
    if how is not None:
        sample = inputs.take(range(how["num_inputs"])) if how["num_inputs"] else None
        given = {} if sample is None else {"sample": sample}
        found = jaxtune.align(
            source, target, config=model, method=how["method"], seed=seed, verify=False, **given, **how["options"]
        )
        source = found.params
        if METHODS[how["method"]].is_folded:
            spec = registry.symmetry_of(model)
            target = canonical.realise(spec, canonical.fold(spec, target), target)
    seconds = time.perf_counter() - began
    weights = np.linspace(0, 1, NUM_POINTS)
    line = line_candidates(source, target, weights)
    if "label" in test.batch and test.batch["label"].ndim == 2:
        metrics = evaluate_texts(line, test)
    else:
        metrics = evaluate_many(line, test.forward, test)
    barrier = measure_barrier(weights, [one.loss for one in metrics])
    return {
        "barrier": barrier.height,
        "at": barrier.weight,
        "losses": list(barrier.losses),
        "accuracies": [one.accuracy for one in metrics],
        "seconds": round(seconds, 2),
    }


def render_page(config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Barrier of every model and alignment: mean over pairs, and each pair."""
    columns = ("model", "alignment", "barrier, nats", "each pair", "worst accuracy on the way, %", "seconds")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for name in (*config["vision"], *config["language"]):
        for alignment in ("as they lie", *config["alignments"]):
            ours = [row for row in rows if row["model"] == name and row["alignment"] == alignment]
            heights = [row["barrier"] for row in ours]
            worst = 100 * np.mean([min(row["accuracies"]) for row in ours])
            seconds = np.median([row["seconds"] for row in ours])
            pairs = ", ".join(f"{height:.3f}" for height in heights)
            lines.append(f"| {name} | {alignment} | {np.mean(heights):.3f} | {pairs} | {worst:.1f} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(measure)
