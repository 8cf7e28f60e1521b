"""What pre-training and fine-tuning share: the config's fields, the fit, the final numbers."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from experiments.workdir import CHECKPOINTS_NAME, Workdir
from jaxtune import tree
from jaxtune.data import DataSource, Loader
from jaxtune.data.source import check_options
from jaxtune.errors import ConfigError
from jaxtune.evaluate.classifier import evaluate_classifier
from jaxtune.models.readout import class_embeddings
from jaxtune.rng import named_key
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.loop import STEP_METRICS, TrainResult, train
from jaxtune.train.metrics import MetricsWriter
from jaxtune.train.optimizer import make_optimizer, make_schedule
from jaxtune.train.step import Forward, create_state, make_mesh, make_train_step, replicate
from jaxtune.types import Params

# Fields of every config. What a dict among them may hold is said by the function that takes it.
FIELDS = (
    "seed",
    "data.name",  # these five: see experiments.sources
    "data.options",
    "data.eval_options",
    "data.classes",
    "data.shifts",
    "frozen_read_out",  # whether class names give the last layer (models.readout), or the outputs are logits
    "batch_size",
    "num_steps",
    "learning_rate",
    "schedule",  # of `train.optimizer.make_schedule`
    "optimizer",  # of `train.optimizer.make_optimizer`
    "label_smoothing",
    "log_every",
    "evaluate_every",
    "save_every",
    "num_kept",  # checkpoints to go on from
    "eval_batch_size",
)
# A config may leave these out.
OPTIONAL = {"mixup": 0.0}  # of `train.step.make_train_step`
EVAL_METRICS = ("loss", "accuracy", "top_k_accuracy", "calibration_error")


def check_fields(config: ml_collections.ConfigDict, fields: tuple[str, ...], *, optional: Iterable[str] = ()) -> None:
    """Checks that a config has exactly these fields, and of the optional ones any; "a.b" is field b of the dict a.

    Raises:
        ConfigError: lists what is missing and what is unknown.
    """
    found, known = set(), (*fields, *optional)

    def walk(values, prefix):
        for name, value in values.items():
            path = f"{prefix}{name}"
            if path not in known and any(field.startswith(f"{path}.") for field in known) and _is_dict(value):
                walk(value, f"{path}.")
            else:
                found.add(path)

    walk(config, "")
    lines = [f"  {name}: missing" for name in fields if name not in found]
    lines += [f"  {name}: no such field" for name in sorted(found - set(known))]
    if lines:
        raise ConfigError(
            f"the config differs from what this program reads in {len(lines)} fields:\n"
            + "\n".join(lines)
            + f"\nIts fields: {', '.join(known)}."
        )


def fit(
    config: ml_collections.ConfigDict,
    model_config: Any,
    workdir: Workdir,
    splits: Mapping[str, DataSource],
    *,
    params: Params,
    forward: Forward,
    to_model: Callable[[Params, Params], Params],
    is_trainable: Callable[[str], bool] = lambda path: True,
    frozen: Params | None = None,
) -> tuple[TrainResult, Params]:
    """Trains as the config says, in its workdir, going on where a former process stopped.

    Args:
        config: With `FIELDS`, and more.
        model_config: Of the network that is evaluated.
        workdir: Of this run.
        splits: Of `sources.open_splits`.
        params: What training changes.
        forward: Of the network in training mode.
        to_model: (trained params, frozen) -> parameters of the network.
        is_trainable: Path within `params` -> whether the optimiser moves it.
        frozen: What `forward` needs besides.

    Returns:
        How training ended, and the parameters of the network.
    """
    schedule_options, optimizer_options = _plain(config.schedule), _plain(config.optimizer)
    check_options("config.schedule", make_schedule, schedule_options)
    check_options("config.optimizer", make_optimizer, optimizer_options)
    mesh = make_mesh(config.batch_size)
    schedule = make_schedule(config.learning_rate, config.num_steps, **schedule_options)
    optimizer = make_optimizer(schedule, **optimizer_options)
    embeddings = embed_classes(config, model_config, splits["train"])
    step = make_train_step(
        forward,
        optimizer,
        mesh,
        named_key(jax.random.key(config.seed), "step"),
        embeddings=embeddings,
        label_smoothing=config.label_smoothing,
        mixup=config.get("mixup", OPTIONAL["mixup"]),
        is_trainable=is_trainable,
    )
    frozen = replicate(frozen or {}, mesh)

    def evaluate(trained):
        metrics = evaluate_classifier(
            model_config,
            to_model(trained, frozen),
            splits["validation"],
            embeddings=embeddings,
            batch_size=config.eval_batch_size,
        )
        return {f"validation_{name}": getattr(metrics, name) for name in EVAL_METRICS}

    columns = [*STEP_METRICS, "learning_rate", *(f"validation_{name}" for name in EVAL_METRICS)]
    with (
        StateSeries(workdir.path / CHECKPOINTS_NAME, num_kept=config.num_kept) as series,
        MetricsWriter(workdir.path, columns) as writer,
    ):
        result = train(
            step,
            create_state(params, optimizer, mesh, is_trainable=is_trainable),
            Loader(splits["train"], config.batch_size, seed=config.seed),
            num_steps=config.num_steps,
            frozen=frozen,
            series=series,
            save_every=config.save_every,
            writer=writer,
            log_every=config.log_every,
            learning_rate=schedule,
            evaluate=evaluate,
            evaluate_every=config.evaluate_every,
        )
    return result, to_model(result.state.params, frozen)


def embed_classes(config: ml_collections.ConfigDict, model_config: Any, source: DataSource) -> jax.Array | None:
    """The frozen read-out of a source's classes; None where the network gives logits.

    Raises:
        ConfigError: the network does not have one logit per class.
    """
    if config.frozen_read_out:
        return jnp.asarray(class_embeddings(source.class_names, model_config.num_outputs))
    if model_config.num_outputs != len(source.class_names):
        raise ConfigError(
            f"the network has {model_config.num_outputs} outputs and {source.name} has {len(source.class_names)} "
            "classes. Give it one output per class, or set config.frozen_read_out=True."
        )
    return None


def measure(
    config: ml_collections.ConfigDict,
    model_config: Any,
    params: Params,
    splits: Mapping[str, DataSource],
    trained: TrainResult,
) -> dict[str, Any]:
    """The content of metrics.json: the finished model on validation and, for the only time, on test."""
    result: dict[str, Any] = {
        "num_steps": int(trained.state.step),
        "num_parameters": tree.count_parameters(params),
        "num_trained_parameters": tree.count_parameters(trained.state.params),
        "examples_per_second": None if math.isnan(trained.examples_per_second) else trained.examples_per_second,
    }
    for split in ("validation", "test"):
        metrics = evaluate_classifier(
            model_config,
            params,
            splits[split],
            embeddings=embed_classes(config, model_config, splits[split]),
            batch_size=config.eval_batch_size,
        )
        result[split] = dataclasses.asdict(metrics)
    return result


def print_result(workdir: Workdir, result: Mapping[str, Any]) -> None:
    """One line per split on stdout."""
    for split in ("validation", "test"):
        metrics = result[split]
        print(
            f"{split}: accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}, "
            f"calibration error {metrics['calibration_error']:.4f}, {metrics['num_examples']} examples"
        )
    print(f"results in {workdir.path}")


def _is_dict(value):
    return isinstance(value, (Mapping, ml_collections.ConfigDict))


def _plain(options):
    return options.to_dict() if isinstance(options, ml_collections.ConfigDict) else dict(options)
