"""The ladder with a little data: every transport by the number of examples, beside controls with the very same ones.

    python -m experiments.few --config=configs/few.py --workdir=runs/few --config.data_dir=DIR

Leaves in the workdir: checkpoints/ (bases and fine-tunes, made once; those of a ladder serve too), measured/ (one file
per pair, task and size), few.json and few.md. The same command goes on after an interruption.
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
from experiments.rungs.networks import Networks, Schedule
from experiments.rungs.pairs import Rungs, build_pairs
from experiments.samples.measure import Bases, measure_sample, measure_without
from experiments.samples.results import write_results
from experiments.sources import open_joined, open_task
from experiments.workdir import CHECKPOINTS_NAME, Workdir
from jaxtune.data import take_sample
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.sampling import make_sample

FIELDS = (
    "seed",
    "data_dir",  # put before every data name that is a file
    "networks",  # folder of bases and fine-tunes; "": checkpoints/ in the workdir
    "split",  # to report on
    "num_pairs",
    "models",  # name -> config of a model family
    "learning_rates",
    "pretrain.sources",
    "pretrain.num_steps",
    "pretrain.batch_size",
    "rungs.branch",  # shares of the steps
    "rungs.release",
    "rungs.continued_rate",
    "rungs.has_other_data",
    "tasks",
    "finetune.num_steps",
    "finetune.batch_size",
    "finetune.learning_rate",
    "num_test",
    "num_support",
    "num_kept",  # unlabelled inputs of the pre-training task, for ways that are to keep it
    "sizes",  # numbers of examples, "N a class"
    "ways",  # name -> {"way": ..., "method": ..., "options": ..., "start": ...}, see experiments.samples.ways
    "comparisons",  # (way, the way that it is to beat)
)


def climb(config: ml_collections.ConfigDict, path: Path, overrides: Sequence[str] = ()) -> int | None:
    """Measures every way on every pair, task and size."""
    check_fields(config, FIELDS)
    plain = config.to_dict()
    workdir = Workdir(path, plain, overrides=overrides, parents={}, seeds={"seed": config.seed})
    where = {"data_dir": config.data_dir}
    pretraining = open_joined(plain["pretrain"]["sources"], "train", **where)
    support = take_sample(open_joined(plain["pretrain"]["sources"], config.split, **where), config.num_support)
    tasks = {
        name: (open_task(data, "train", **where), take_sample(open_task(data, config.split, **where), config.num_test))
        for name, data in plain["tasks"].items()
    }
    finetune = Schedule(config.finetune.num_steps, config.finetune.learning_rate, config.finetune.batch_size)
    pretrain = Schedule(config.pretrain.num_steps, 0.0, config.pretrain.batch_size)
    rungs = Rungs(
        False,
        (),
        tuple(config.rungs.release),
        tuple(config.rungs.branch),
        config.rungs.continued_rate,
        has_other_data=config.rungs.has_other_data,
    )
    rows = []
    for model, values in plain["models"].items():
        model_config = registry.config_from_dict(values)
        keep = make_sample(model_config, pretraining, num_examples=config.num_kept, seed=config.seed).without_labels()
        networks = Networks(
            model_config, (Path(config.networks) if config.networks else path / CHECKPOINTS_NAME) / model
        )
        schedule = replace(pretrain, learning_rate=config.learning_rates[model])
        for pair, source, target in build_pairs(
            networks, pretraining, schedule, rungs, num_pairs=config.num_pairs, seed=config.seed
        ):
            key, aligned = named_key(jax.random.key(config.seed), pair.name), {}
            for task, (train, test) in tasks.items():

                def tuned(base, params, networks=networks, train=train, task=task):
                    return networks.train(f"{base}_tuned_{task}", lambda: params, train, finetune, seed=config.seed)

                folder = path / "measured" / model / pair.name / task
                names = ["without", "0", *(str(size) for size in config.sizes)]
                missing = [name for name in names if not (folder / f"{name}.json").exists()]
                if missing:
                    print(f"measuring {model} {pair.name} {task}: {', '.join(missing)}", file=sys.stderr, flush=True)
                    bases = Bases(source, tuned(pair.source, source), target, tuned(pair.target, target))
                    known = {}
                    for name in missing:
                        size = int(name) if name.isdigit() else name
                        measured = (
                            measure_without(model_config, bases, test, support)
                            if name == "without"
                            else measure_sample(
                                model_config,
                                bases,
                                plain["ways"],
                                train,
                                test,
                                support,
                                keep,
                                size=size,
                                draw=config.seed + pair.index,
                                key=named_key(key, task, name),
                                pair_key=key,
                                known=known,
                                aligned=aligned,
                            )
                        )
                        workdir.keep_measured(folder / f"{name}.json", measured)
                where_from = {"model": model, "rung": pair.rung, "index": pair.index, "task": task}
                for name in names:
                    rows += [where_from | row for row in json.loads((folder / f"{name}.json").read_text())]
        jax.clear_caches()
    write_results(workdir, plain, rows)
    return None


if __name__ == "__main__":
    run_main(climb)
