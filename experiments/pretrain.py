"""Trains a classifier from scratch.

    python -m experiments.pretrain --config=configs/pretrain_glyphs.py --workdir=runs/glyphs [--config.seed=1]

The same command goes on after an interruption. See experiments/workdir.py for what it leaves.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections

from experiments.command import run_main
from experiments.fitting import FIELDS, OPTIONAL, check_fields, fit, measure, print_result
from experiments.sources import open_splits
from experiments.workdir import Workdir
from jaxtune.checkpoint.output import make_layout, write_checkpoint
from jaxtune.models import registry
from jaxtune.rng import named_key


def pretrain(config: ml_collections.ConfigDict, path: Path, overrides: Sequence[str] = ()) -> int | None:
    """Runs the config in the folder `path`; returns the signal that ended it early, or None when it is finished."""
    check_fields(config, (*FIELDS, "model"), optional=OPTIONAL)
    model_config = registry.config_from_dict(config.model.to_dict())
    splits = open_splits(config.data)
    workdir = Workdir(path, config.to_dict(), overrides=overrides, parents={}, seeds={"seed": config.seed})
    if (result := workdir.read_result()) is not None:
        print_result(workdir, result)
        return None

    def forward(params, frozen, batch, key):
        return registry.apply_train(model_config, params, batch, key)

    trained, params = fit(
        config,
        model_config,
        workdir,
        splits,
        params=registry.init(named_key(jax.random.key(config.seed), "init"), model_config),
        forward=forward,
        to_model=lambda trained, frozen: trained,
        is_trainable=lambda path: registry.is_trainable(model_config, path),
    )
    if not trained.is_finished:
        return trained.stop_signal
    layout = make_layout(params, registry.config_to_dict(model_config))
    workdir.publish("model", lambda folder: write_checkpoint(folder, params, layout))
    result = measure(config, model_config, params, splits, trained)
    workdir.write_result(result)
    print_result(workdir, result)
    return None


if __name__ == "__main__":
    run_main(pretrain)
