"""What is measured on one pair of bases: every transport and every control on every task, and the pair itself."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.rungs.networks import Networks, Schedule
from experiments.rungs.pairs import Pair
from jaxtune.align.evidence import judge_match
from jaxtune.data import DataSource, take_few
from jaxtune.errors import JaxtuneError
from jaxtune.evaluate.classifier import evaluate_classifier
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.models import registry
from jaxtune.models.readout import class_embeddings
from jaxtune.rng import named_key
from jaxtune.symmetry import canonical
from jaxtune.symmetry import element as elements
from jaxtune.transport.controls import draw_as_long
from jaxtune.transport.prepared import Prepared, apply_transport
from jaxtune.transport.registry import METHODS, prepare_transport, without_data
from jaxtune.tree import flatten, map_leaves, task_vector
from jaxtune.types import Params

EVAL_BATCH = 250
SHOTS, SHOT_STEPS = 2, 50


@dataclass(frozen=True)
class Task:
    """A fine-tuning task: `train` to fine-tune on, `test` to report on; nothing is chosen by either."""

    name: str
    train: DataSource
    test: DataSource


def measure_pair(
    networks: Networks,
    pair: Pair,
    source: Params,
    target: Params,
    tasks: Mapping[str, Task],
    schedule: Schedule,
    support: DataSource,
    *,
    variants: Mapping[str, tuple[str, Mapping[str, Any]]],
    seed: int,
) -> dict[str, Any]:
    """All numbers of one pair: {"pair": facts about the bases, "rows": one per task and method}.

    Args:
        networks: Where fine-tunes are kept.
        pair: Which one.
        source, target: The two bases.
        tasks: By name.
        schedule: Of every fine-tune.
        support: Test records of the pre-training task.
        variants: Name -> (method, options): measured beside the methods as they are.
        seed: Of the alignments and of the order of the fine-tuning data.
    """
    config = networks.config
    key = named_key(jax.random.key(seed), pair.name)

    def finetune(base, params, task, kind="tuned", data=None, length=schedule):
        name = f"{base}_{kind}_{task.name}"
        return networks.train(name, lambda: params, data or task.train, length, seed=seed)

    tuned = {name: finetune(pair.source, source, task) for name, task in tasks.items()}
    prepared, seconds = _prepare(key, config, source, next(iter(tuned.values())), target, variants)
    controls = _controls(key, config, source, target, prepared)
    facts = _facts(key, config, source, target, prepared, support)
    rows = []
    for name, task in tasks.items():

        def row(method, kind, params, scores_support=True, task=task):
            scores = {"accuracy": _accuracy(config, params, task.test)}
            if scores_support:
                scores["support"] = _accuracy(config, params, support)
            rows.append({"task": task.name, "method": method, "kind": kind, **scores})

        row("base", "base", target)
        if pair.is_equivalent:  # the new base is the old one, so its ceiling is the fine-tune that there is
            row("ceiling", "ceiling", tuned[name])
        else:
            row("ceiling", "ceiling", finetune(pair.target, target, task))
            few = replace(schedule, num_steps=SHOT_STEPS)
            shots = finetune(pair.target, target, task, f"{SHOTS}_shots", take_few(task.train, SHOTS), few)
            row(f"{SHOTS} shots a class", "control", shots)
        for method, ready in prepared.items():
            moved = replace(ready, task_vector=ready.move(tuned[name]))
            row(method, "method" if method in METHODS else "variant", apply_transport(moved, target))
        for control, move in controls.items():
            row(control, "control", move(named_key(key, name), tuned[name]), scores_support=False)
    return {
        "pair": {"rung": pair.rung, "index": pair.index, "seconds": seconds, **facts},
        "rows": [{"rung": pair.rung, "index": pair.index, **values} for values in rows],
    }


def ask_other_width(config: Any, wider: Any, source: Params, finetuned: Params) -> dict[str, str]:
    """What each method says to a base of another width: its refusal, or "accepted"."""
    target = registry.init(jax.random.key(0), wider)
    answers = {}
    for method in without_data():
        try:
            prepare_transport(
                jax.random.key(0), partial(registry.symmetry_of, config), source, finetuned, target, method=method
            )
            answers[method] = "accepted"
        except JaxtuneError as error:
            answers[method] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return answers


def _prepare(key, config, source, finetuned, target, variants):
    """Name -> prepared transport, and seconds each took (the first of a process compiles)."""
    prepared, seconds = {}, {}
    symmetry_of = partial(registry.symmetry_of, config)
    for name, (method, options) in ({method: (method, {}) for method in without_data()} | dict(variants)).items():
        began = time.perf_counter()
        prepared[name] = prepare_transport(
            named_key(key, name), symmetry_of, source, finetuned, target, method=method, **options
        )
        seconds[name] = round(time.perf_counter() - began, 3)
    return prepared, seconds


def _controls(key, config, source, target, prepared: Mapping[str, Prepared]):
    """Name -> (key, fine-tune) -> the new base after a step that means nothing, or nothing in this place."""
    spec, full = registry.symmetry_of(config), prepared["full"]
    drawn = elements.random(named_key(key, "random element"), full.spec)
    shuffled = _shift_layers(full.element, config.depth)

    def by(element, _, finetuned):
        change = task_vector(full.fold(source), full.fold(finetuned))
        moved = canonical.unfold(spec, elements.apply(full.spec, element, change), target).task_vector
        return _add(spec, target, moved)

    def noise(key, finetuned):
        return _add(spec, target, draw_as_long(key, task_vector(source, finetuned)))

    return {
        "random vector of the same norms": noise,
        "random element": partial(by, drawn),
        "full with its layers shuffled": partial(by, shuffled),
    }


def _add(spec, target, vector):
    return apply_transport(Prepared(map_leaves(lambda _, leaf: leaf.astype(np.float32), vector), spec), target)


def _shift_layers(element, depth):
    """Every block takes the element of the next: right for the stream, wrong for what is inside the blocks."""

    def other(name):
        words = name.split("/")
        block = [n for n, word in enumerate(words) if word.startswith("block_")]
        if block:
            words[block[0]] = f"block_{(int(words[block[0]].removeprefix('block_')) + 1) % depth}"
        return "/".join(words)

    return {name: element[other(name)] for name in element}


def _facts(key, config, source, target, prepared, support) -> dict[str, Any]:
    """The two bases: how they do, how far apart they lie, what lies between them, what the weights say."""
    full, permuted, auto = (prepared[name] for name in ("full", "permutation", "auto"))
    ends = {
        "identity": (source, target),
        "permutation": (elements.apply(permuted.spec, permuted.element, source), target),
        "full": (
            full.realise(elements.apply(full.spec, full.element, full.fold(source)), source),
            full.realise(full.fold(target), target),
        ),
    }
    middle = {name: _score(config, interpolate_linear(*pair, 0.5), support) for name, pair in ends.items()}
    mean_loss = np.mean([_score(config, params, support)["loss"] for params in (source, target)])
    folded, base = full.fold(source), full.fold(target)
    evidence = judge_match(named_key(key, "facts"), full.spec, base, folded, full.element)
    return {
        "source_accuracy": _accuracy(config, source, support),
        "target_accuracy": _accuracy(config, target, support),
        "middle": {name: {**scores, "barrier": scores["loss"] - float(mean_loss)} for name, scores in middle.items()},
        "cosine": {name: evidence.cosine[name] for name in ("identity", "found")},
        "residuals": auto.info["residuals"],
        "chosen": auto.info["chosen"],
        "verdict": auto.info["because"],
        "distance": _distance(source, target),
        "sweeps": {name: ready.info["num_sweeps"] for name, ready in prepared.items() if "num_sweeps" in ready.info},
    }


def _distance(source, target) -> float:
    """`||B - A|| / ||A||` of the weights as they lie."""
    ours, theirs = flatten(source), flatten(target)
    apart = sum(float(np.sum(np.square(np.float64(theirs[path]) - leaf))) for path, leaf in ours.items())
    return float(np.sqrt(apart / sum(float(np.sum(np.square(np.float64(leaf)))) for leaf in ours.values())))


def _score(config, params, source) -> dict[str, float]:
    embeddings = class_embeddings(source.class_names, config.num_outputs)
    metrics = evaluate_classifier(config, params, source, embeddings=embeddings, batch_size=EVAL_BATCH)
    return {"accuracy": metrics.accuracy, "loss": metrics.loss}


def _accuracy(config, params, source) -> float:
    return _score(config, params, source)["accuracy"]
