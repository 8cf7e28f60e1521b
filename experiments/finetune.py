"""Fine-tunes a classifier: all of its weights, a drawn half of its matrices, or LoRA factors beside them.

    python -m experiments.finetune --config=configs/finetune_digits.py --workdir=runs/digits \\
        --config.base=runs/glyphs/model [--config.lora.rank=4]

The same command goes on after an interruption. Beside what experiments/workdir.py lists, a run with LoRA leaves
adapter/ (adapter.safetensors, adapter_config.json), and then model/ only where config.lora.merge is True.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from experiments.command import run_main
from experiments.fitting import FIELDS, OPTIONAL, check_fields, fit, measure, print_result
from experiments.sources import open_splits
from experiments.workdir import Workdir
from jaxtune import tree
from jaxtune.checkpoint import load, write_checkpoint
from jaxtune.checkpoint.manifest import describe_checkpoint
from jaxtune.errors import ConfigError
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.train.adapter import write_adapter
from jaxtune.train.half import draw_half
from jaxtune.train.lora import init_lora, lora_scale, merge_lora

HALF_FIELDS = ("half.level", "half.stage")  # of `train.half.draw_half`; a config may leave them out
LORA_FIELDS = ("lora.rank", "lora.alpha", "lora.is_rank_stabilised", "lora.patterns", "lora.merge")


def finetune(config: ml_collections.ConfigDict, path: Path, overrides: Sequence[str] = ()) -> int | None:
    """Runs the config in the folder `path`; returns the signal that ended it early, or None when it is finished."""
    check_fields(config, (*FIELDS, "base", *LORA_FIELDS), optional=(*OPTIONAL, *HALF_FIELDS))
    if not config.base:
        raise ConfigError("config.base is not set. Name the folder of the model to fine-tune: --config.base=DIR.")
    base = load(config.base)
    model_config = registry.config_from_dict(base.config)
    # Whatever the base is stored in, small updates need float32; the result is rounded once, when it is written.
    params = tree.map_leaves(lambda _, leaf: leaf.astype(np.float32) if tree.is_float(leaf) else leaf, base.params)
    splits = open_splits(config.data)
    origin = describe_checkpoint(base)
    workdir = Workdir(
        path, config.to_dict(), overrides=overrides, parents={"base": origin}, seeds={"seed": config.seed}
    )
    if (result := workdir.read_result()) is not None:
        print_result(workdir, result)
        return None

    is_lora = config.lora.rank is not None
    half = _draw_half(config, model_config, params)
    if is_lora and half is not None:
        raise ConfigError("config.half.level and config.lora.rank are both set; factors are trained all. Unset one.")
    if is_lora:
        trained, params = _fit_factors(config, model_config, workdir, splits, params)
    else:
        trained, params = _fit_weights(config, model_config, workdir, splits, params, half)
    if not trained.is_finished:
        return trained.stop_signal
    if is_lora:
        facts = {
            "rank": config.lora.rank,
            "alpha": config.lora.alpha,
            "is_rank_stabilised": config.lora.is_rank_stabilised,
            "scale": _scale_of(config),
            "patterns": config.lora.patterns,
            "base": config.base,
            "base_sha256": origin["sha256"],
        }
        factors = trained.state.params
        workdir.publish("adapter", lambda folder: write_adapter(folder, factors, **facts), inputs=[base.path])
    if not is_lora or config.lora.merge:
        workdir.publish(
            "model",
            lambda folder: write_checkpoint(folder, params, base.layout, side_files=base.side_files),
            inputs=[base.path],
        )
    result = measure(config, model_config, params, splits, trained)
    if half is not None:
        result["half"] = half.facts()
    workdir.write_result(result)
    print_result(workdir, result)
    return None


def _draw_half(config, model_config, params):
    """The half that is trained; None where all is."""
    half = config.get("half")
    if half is None or half.level is None:
        return None
    return draw_half(
        tree.flatten(params),
        seed=config.seed,
        stage=half.stage,
        level=half.level,
        is_trainable=lambda path: registry.is_trainable(model_config, path),
    )


def _fit_weights(config, model_config, workdir, splits, params, half):
    """Trains every leaf that the family lets gradients move, or the half of them that was drawn."""

    def forward(params, frozen, batch, key):
        return registry.apply_train(model_config, params, batch, key)

    return fit(
        config,
        model_config,
        workdir,
        splits,
        params=params,
        forward=forward,
        to_model=lambda trained, frozen: trained,
        is_trainable=(half.is_trained if half is not None else lambda path: registry.is_trainable(model_config, path)),
    )


def _fit_factors(config, model_config, workdir, splits, params):
    """Trains LoRA factors; the base is frozen."""
    family = registry.FAMILIES[registry.config_to_dict(model_config)["model_type"]]
    if family.apply_train is not None:
        raise ConfigError(
            f"config.lora.rank is {config.lora.rank}, but {config.base} keeps running statistics, which would move "
            "while the base is to stay as it is. Fine-tune all of its weights: leave config.lora.rank unset."
        )
    scale = _scale_of(config)
    key = named_key(jax.random.key(config.seed), "lora")

    def forward(factors, base, batch, key):
        outputs, _ = registry.apply_train(model_config, merge_lora(base, factors, scale=scale), batch, key)
        return outputs, factors

    return fit(
        config,
        model_config,
        workdir,
        splits,
        params=init_lora(key, params, rank=config.lora.rank, patterns=config.lora.patterns),
        forward=forward,
        to_model=lambda factors, base: merge_lora(base, factors, scale=scale),
        frozen=params,
    )


def _scale_of(config):
    return lora_scale(config.lora.rank, alpha=config.lora.alpha, is_rank_stabilised=config.lora.is_rank_stabilised)


if __name__ == "__main__":
    run_main(finetune)
