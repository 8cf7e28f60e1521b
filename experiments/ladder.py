"""Measures every transport on a ladder of base pairs, from a replanted copy to another seed and other data.

    python -m experiments.ladder --config=configs/ladder_small.py --workdir=runs/ladder_small
    python -m experiments.ladder --config=configs/ladder.py --workdir=runs/ladder --config.data_dir=DIR

Leaves in the workdir: checkpoints/ (every base and fine-tune, made once), measured/ (one file per pair), and
ladder.json, ladder.md and figures. The same command goes on after an interruption.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import ml_collections

from experiments.command import run_main
from experiments.fitting import check_fields
from experiments.rungs.measure import Task, ask_other_width, measure_pair
from experiments.rungs.networks import Networks, Schedule
from experiments.rungs.pairs import Rungs, build_pairs
from experiments.rungs.results import write_results
from experiments.sources import open_joined, open_task
from experiments.workdir import CHECKPOINTS_NAME, Workdir
from jaxtune.data import take_sample
from jaxtune.errors import unknown_name
from jaxtune.models import registry

FIELDS = (
    "seed",
    "data_dir",  # put before every data name that ends in .npz
    "only",  # "": everything; a model's name or "transition": this part now, results when all are there
    "split",  # to report on: "test"; "validation" is for whoever wants to choose something by the ladder
    "variants",  # name -> {"method": ..., "options": {...}}: measured beside the methods
    "num_pairs",  # per rung
    "models",  # name -> config of a model family
    "learning_rates",  # name of the model -> peak rate of its pre-training
    "pretrain.sources",  # data of the bases; see experiments.sources for the fields of one
    "pretrain.num_steps",
    "pretrain.batch_size",
    "rungs.drift",  # shares of the pre-training's steps
    "rungs.release",
    "rungs.branch",
    "rungs.continued_rate",  # peak learning rate of L1 and L2
    "tasks",  # name -> data of a fine-tuning task
    "finetune.num_steps",
    "finetune.batch_size",
    "finetune.learning_rate",
    "num_test",  # test records per task, drawn by chance
    "num_support",  # test records of the pre-training task
    "transition.widths",  # () leaves the transition out
    "transition.num_steps",
    "transition.learning_rate",
    "transition.num_pairs",
)


def climb(config: ml_collections.ConfigDict, path: Path, overrides: Sequence[str] = ()) -> int | None:
    """Builds and measures the whole ladder in the folder `path`."""
    check_fields(config, FIELDS)
    parts = (*config.models, "transition")
    if config.only and config.only not in parts:
        raise unknown_name("config.only", config.only, parts)
    # Several processes may share one workdir, each with a part.
    shared = {name: value for name, value in config.to_dict().items() if name != "only"}
    workdir = Workdir(path, shared, overrides=overrides, parents={}, seeds={"seed": config.seed})
    where = {"data_dir": config.data_dir}
    support = take_sample(open_joined(config.pretrain.sources, config.split, **where), config.num_support)
    pretraining = open_joined(config.pretrain.sources, "train", **where)
    tasks = {
        name: Task(
            name,
            open_task(data, "train", **where),
            take_sample(open_task(data, config.split, **where), config.num_test),
        )
        for name, data in config.tasks.items()
    }
    finetune = Schedule(config.finetune.num_steps, config.finetune.learning_rate, config.finetune.batch_size)
    pretrain = Schedule(config.pretrain.num_steps, 0.0, config.pretrain.batch_size)
    measured, refusals = [], {}
    variants = {name: (row["method"], dict(row["options"])) for name, row in shared["variants"].items()}

    def climb_model(name, model_config, schedule, rungs, num_pairs):
        networks = Networks(model_config, path / CHECKPOINTS_NAME / name)
        for pair, source, target in build_pairs(
            networks, pretraining, schedule, rungs, num_pairs=num_pairs, seed=config.seed
        ):
            file = path / "measured" / name / f"{pair.name}.json"
            if not file.exists():
                print(f"measuring {name} {pair.name}", file=sys.stderr, flush=True)
                result = measure_pair(
                    networks, pair, source, target, tasks, finetune, support, variants=variants, seed=config.seed
                )
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(".tmp")
                partial.write_text(json.dumps(result, indent=1, allow_nan=False))
                partial.replace(file)
            yield source, json.loads(file.read_text())

    shares = {name: tuple(config.rungs[name]) for name in ("drift", "release", "branch")}
    rungs = Rungs(is_planted=True, **shares, continued_rate=config.rungs.continued_rate, has_other_data=True)
    for name, values in config.models.items():
        if config.only not in ("", name):
            continue
        model_config = registry.config_from_dict(values.to_dict())
        schedule = replace(pretrain, learning_rate=config.learning_rates[name])
        source = None
        for base, result in climb_model(name, model_config, schedule, rungs, config.num_pairs):
            measured.append({"model": name, **result})
            source = base
        wider = replace(model_config, width=model_config.width * 3 // 2)
        refusals[name] = ask_other_width(model_config, wider, source, source)
        jax.clear_caches()
    transition = []
    only_seeds = Rungs(False, (), (), (), config.rungs.continued_rate, has_other_data=False)
    narrow = next(iter(config.models.values())).to_dict()
    for width in config.transition.widths if config.only in ("", "transition") else ():
        model = narrow | {"width": width, "mlp_width": 2 * width, "num_heads": max(2, width // 16)}
        for num_steps in config.transition.num_steps:
            name = f"width_{width}_steps_{num_steps}"
            schedule = replace(pretrain, num_steps=num_steps, learning_rate=config.transition.learning_rate)
            for _, result in climb_model(
                name, registry.config_from_dict(model), schedule, only_seeds, config.transition.num_pairs
            ):
                transition.append({"width": width, "num_steps": num_steps, **result})
        jax.clear_caches()
    if not config.only:
        write_results(workdir, shared, measured, refusals, transition)
    return None


if __name__ == "__main__":
    run_main(climb)
