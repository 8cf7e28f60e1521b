"""Soups of sixteen fine-tunes of one base, with other hyperparameters each: in distribution and under shifts.

    python -m experiments.soups --config=configs/soups.py --workdir=runs/soups --config.data_dir=DIR

Which models go into a soup, and the best single one, validation records say; test records and their shifts are only
reported on. Leaves checkpoints/, soups.json and soups.md in the workdir; the same command goes on.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from experiments.command import run_main
from experiments.fitting import check_fields
from experiments.rungs.networks import Networks, Schedule
from experiments.sources import open_joined, open_task
from experiments.suite.experts import train_base
from experiments.workdir import CHECKPOINTS_NAME, Workdir
from jaxtune.compose.registry import compose
from jaxtune.data import shift_source, take_few, take_sample
from jaxtune.evaluate.candidates import stack_candidates
from jaxtune.evaluate.many import evaluate_many
from jaxtune.models import registry
from jaxtune.sampling import make_sample

FIELDS = (
    "seeds",
    "data_dir",  # put before every data name that is a file
    "networks",  # folder of the bases; "": checkpoints/ in the workdir
    "model",
    "pretrain.sources",
    "pretrain.num_steps",
    "pretrain.batch_size",
    "pretrain.learning_rate",
    "task",  # data of the one task
    "num_per_class",  # train records; None: all
    "num_models",
    "draws.learning_rate",  # lowest and highest, drawn on a log scale
    "draws.num_steps",
    "draws.weight_decay",
    "draws.label_smoothing",
    "batch_size",
    "shifts",  # name -> {"name": ..., "options": ...} of `data.shift_source`
    "soups",  # name -> {"method": ..., "options": ...}
    "num_validation",
    "num_test",
)


def cook(config: ml_collections.ConfigDict, path: Path, overrides: Sequence[str] = ()) -> int | None:
    """Fine-tunes what is missing, makes every soup, writes the tables."""
    check_fields(config, FIELDS)
    plain = config.to_dict()
    workdir = Workdir(path, plain, overrides=overrides, parents={}, seeds={"seed": config.seeds[0]})
    model = registry.config_from_dict(plain["model"])
    where = {"data_dir": config.data_dir}
    splits = {name: open_task(plain["task"], name, **where) for name in ("train", "validation", "test")}
    train = splits["train"] if config.num_per_class is None else take_few(splits["train"], config.num_per_class)
    validation = make_sample(model, take_sample(splits["validation"], config.num_validation))
    test = take_sample(splits["test"], config.num_test)
    tests = {"test": make_sample(model, test)}
    for name, shift in plain["shifts"].items():
        tests[name] = make_sample(model, shift_source(test, shift["name"], **shift["options"]))
    networks = Networks(model, path / CHECKPOINTS_NAME)
    bases = Networks(model, Path(config.networks) if config.networks else path / CHECKPOINTS_NAME)
    pretraining = open_joined(plain["pretrain"]["sources"], "train", **where)
    pretrain = Schedule(config.pretrain.num_steps, config.pretrain.learning_rate, config.pretrain.batch_size)
    rows = []
    for seed in config.seeds:
        name, base = train_base(bases, model, pretraining, pretrain, seed=seed)
        drawn = [_draw(plain["draws"], plain["batch_size"], seed, n) for n in range(config.num_models)]
        tune = partial(networks.train, start=lambda base=base: base, source=train)
        models = [
            tune(f"{name}_tuned_{n}", schedule=schedule, seed=100 * seed + n, label_smoothing=smooth)
            for n, (schedule, smooth) in enumerate(drawn)
        ]
        print(f"seed {seed}: soups", file=sys.stderr, flush=True)
        made = {}
        for soup, row in plain["soups"].items():
            composition = compose(row["method"], base, models, [validation], seed=seed, **row["options"])
            made[soup] = composition.params
        scores = [one.accuracy for one in evaluate_many(stack_candidates(models), validation.forward, validation)]
        best = int(np.argmax(scores))
        singles = {f"model {n}": params for n, params in enumerate(models)}
        rows += _measure(seed, {"best single": models[best], **singles, **made}, validation, tests)
    workdir.publish_text("soups.json", json.dumps({"config": plain, "rows": rows}, indent=1, allow_nan=False) + "\n")
    page = render_page(plain, rows)
    workdir.publish_text("soups.md", page)
    print(page)
    return None


def _draw(draws, batch_size, seed, n) -> tuple[Schedule, float]:
    """Hyperparameters of one model: the learning rate evenly on a log scale, the others among the values named."""
    draw = np.random.RandomState(1000 * seed + n)
    low, high = np.log(draws["learning_rate"])
    rate = float(np.exp(low + (high - low) * draw.rand()))
    steps, decay, smooth = (
        draws[name][draw.randint(len(draws[name]))] for name in ("num_steps", "weight_decay", "label_smoothing")
    )
    return Schedule(steps, rate, batch_size, decay), smooth


def _measure(seed, models, validation, tests) -> list[dict[str, Any]]:
    """One row a model: accuracy on validation, test and every shift."""
    candidates = stack_candidates(list(models.values()))
    columns = {
        name: [one.accuracy for one in evaluate_many(candidates, sample.forward, sample)]
        for name, sample in {"validation": validation, **tests}.items()
    }
    return [
        {"seed": seed, "model": name, **{column: values[n] for column, values in columns.items()}}
        for n, name in enumerate(models)
    ]


def render_page(config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with their spread; shifts also as one mean."""
    shifts = list(config["shifts"])
    columns = ["validation", "test", *shifts, "mean of shifts"]
    names = ["mean of models", "best single", *config["soups"]]
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in names:
        table = []
        for seed in config["seeds"]:
            ours = [
                row
                for row in rows
                if row["seed"] == seed
                and (row["model"] == name or (name == "mean of models" and row["model"].startswith("model ")))
            ]
            values = {column: np.mean([row[column] for row in ours]) for column in columns[:-1]}
            table.append([*values.values(), np.mean([values[shift] for shift in shifts])])
        table = 100 * np.array(table)
        spread = table.std(axis=0, ddof=1) if len(table) > 1 else np.zeros(table.shape[1])
        cells = (f"{mean:.1f} ± {sd:.1f}" for mean, sd in zip(table.mean(axis=0), spread, strict=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(cook)
