"""Every merge method on a suite of tasks fine-tuned from one base, plain and under stress.

    python -m experiments.merge --config=configs/merge_glyphs.py --workdir=runs/merge_glyphs --config.data_dir=DIR

Leaves in the workdir: checkpoints/ (bases and experts, made once), measured/ (one file per seed, scenario and method),
merge.json and merge.md. The same command goes on after an interruption.

A method is reported as its own defaults make it, and with its update scaled as validation records like it best.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

import jaxtune
from experiments.command import run_main
from experiments.fitting import check_fields
from experiments.rungs.networks import Networks, Schedule
from experiments.sources import open_joined, open_task
from experiments.suite.compose import compose_experts
from experiments.suite.experts import Task, put_under_stress, train_base, train_experts
from experiments.suite.results import write_results
from experiments.suite.score import choose_scale, normalise, score_tasks
from experiments.workdir import CHECKPOINTS_NAME, Workdir
from jaxtune.data import take_sample
from jaxtune.models import registry

FIELDS = (
    "seeds",
    "data_dir",  # put before every data name that is a file
    "model",  # config of a model family
    "pretrain.sources",
    "pretrain.num_steps",
    "pretrain.batch_size",
    "pretrain.learning_rate",
    "tasks",  # name -> data of a task
    "finetune.num_steps",
    "finetune.batch_size",
    "finetune.learning_rate",
    "scenarios",  # of "plain", "stress"
    "scales",  # that validation records choose among
    "methods",  # name -> {"method": of `jaxtune methods`, "options": {...}}
    "composed",  # the same, of methods that learn on examples: {"method": ..., "options": ..., "is_labelled": ...}
    "num_samples",  # examples a task for those, drawn from train
    "num_validation",
    "num_test",
)


def compare(config: ml_collections.ConfigDict, path: Path, overrides: Sequence[str] = ()) -> int | None:
    """Trains what is missing, merges by every method, writes the tables."""
    check_fields(config, FIELDS)
    plain = config.to_dict()
    workdir = Workdir(path, plain, overrides=overrides, parents={}, seeds={"seed": config.seeds[0]})
    model = registry.config_from_dict(plain["model"])
    where = {"data_dir": config.data_dir}
    tasks = {name: _open(name, data, plain, where) for name, data in plain["tasks"].items()}
    pretraining = open_joined(plain["pretrain"]["sources"], "train", **where)
    networks = Networks(model, path / CHECKPOINTS_NAME)
    rows = []
    for seed in config.seeds:
        base = train_base(networks, model, pretraining, _schedule(plain["pretrain"]), seed=seed)
        finetune = _schedule(plain["finetune"])
        experts = train_experts(networks, base, tasks, finetune, seed=seed)
        for scenario in config.scenarios:
            ours = experts
            if scenario == "stress":
                ours = put_under_stress(networks, base, experts, tasks, finetune, seed=seed)
            ceilings = {
                name: score_tasks(model, ours[name], {name: task}, split="test") for name, task in tasks.items()
            }
            ceilings = {name: scores[name] for name, scores in ceilings.items()}

            def measure(kind, name, make, *, base=base[1], ceilings=ceilings, seed=seed, scenario=scenario):
                file = path / "measured" / f"{seed}_{scenario}_{name.replace('/', '_').replace(' ', '_')}.json"
                if not file.exists():
                    print(f"{scenario}, seed {seed}: {name}", file=sys.stderr, flush=True)
                    row = _measure(model, base, ceilings, tasks, make, kind, plain["scales"])
                    workdir.keep_measured(
                        file, {"method": name, "kind": kind, "seed": seed, "scenario": scenario, **row}
                    )
                rows.append(json.loads(file.read_text()))

            measure("reference", "base", lambda base=base: base[1])
            measure("reference", "experts, one a task", None)
            for name, row in plain["methods"].items():
                measure("method", name, lambda row=row, ours=ours, base=base: _merge(row, base[1], ours))
            for name, row in plain["composed"].items():
                measure(
                    "composed",
                    name,
                    lambda row=row, ours=ours, base=base, seed=seed: compose_experts(
                        row, model, base[1], ours, tasks, num_samples=plain["num_samples"], seed=seed
                    ),
                )
            jax.clear_caches()
    write_results(workdir, plain, rows)
    return None


def _open(name, data, plain, where):
    parts = {split: open_task(data, split, **where) for split in ("train", "validation", "test")}
    return Task(
        name,
        parts["train"],
        take_sample(parts["validation"], plain["num_validation"]),
        take_sample(parts["test"], plain["num_test"]),
    )


def _schedule(values: Mapping[str, Any]) -> Schedule:
    return Schedule(values["num_steps"], values["learning_rate"], values["batch_size"])


def _merge(row, base, experts):
    return jaxtune.merge(list(experts.values()), base=base, method=row["method"], **row["options"])


def _measure(model, base, ceilings, tasks, make, kind, scales) -> dict[str, Any]:
    """Accuracy of every task on test records, as made and with the scale that validation records choose."""
    if make is None:
        return {"tasks": ceilings, **normalise(ceilings, ceilings), "seconds": 0.0}
    began = time.perf_counter()
    merged = jax.tree.map(np.asarray, make())
    seconds = time.perf_counter() - began
    accuracies = score_tasks(model, merged, tasks, split="test")
    row = {"tasks": accuracies, **normalise(accuracies, ceilings), "seconds": round(seconds, 3)}
    if kind != "method":
        return row
    scale, scaled, curve = choose_scale(model, base, merged, tasks, scales)
    accuracies = score_tasks(model, scaled, tasks, split="test")
    return {
        **row,
        "scaled": {"scale": scale, "curve": curve, "tasks": accuracies, **normalise(accuracies, ceilings)},
    }


if __name__ == "__main__":
    run_main(compare)
