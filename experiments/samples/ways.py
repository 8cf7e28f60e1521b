"""The ways to use a few examples that are compared: transports, distillation, tuning, and rules of prediction."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxtune.compose.fewshot import tune_few
from jaxtune.evaluate.proxy import with_proxy
from jaxtune.models import registry
from jaxtune.polish import polish_transport
from jaxtune.rng import named_key
from jaxtune.sample import Sample, inputs_of
from jaxtune.symmetry import Spec
from jaxtune.teach.distill import distill
from jaxtune.transport.prepared import Prepared, apply_transport
from jaxtune.transport.registry import prepare_transport
from jaxtune.tree import task_vector
from jaxtune.types import Params


@dataclass(frozen=True)
class Way:
    """One kind of thing to do with examples.

    Attributes:
        make: (given, row of the config) -> parameters, or a function from a batch to logits.
        is_free: Whether it needs no examples.
    """

    make: Callable[["Given", Mapping[str, Any]], Any]
    is_free: bool = False


@dataclass(frozen=True)
class Given:
    """What every way may look at; ways that others start from are made once.

    Attributes:
        config: Of the family.
        source, finetuned, target: Old base, its fine-tune, new base.
        sample: Labelled examples; a way that may not see labels takes them off. None for ways that need none.
        keep: Unlabelled inputs of the pre-training task, for ways that are to keep it.
        key: Of the methods that look at the examples.
        pair_key: Of those that need none; the same for all tasks and sizes of a pair.
        known: Name of a data-free way -> what it made of this task.
        aligned: Name of a data-free way -> its transport, made once for all tasks of the pair.
        ways: All of the config, by name.
        made: Name of a way -> what it made of these examples.
    """

    config: Any
    source: Params
    finetuned: Params
    target: Params
    sample: Sample | None
    keep: Sample | None
    key: jax.Array
    pair_key: jax.Array
    known: dict[str, Any]
    aligned: dict[str, Prepared]
    ways: Mapping[str, Mapping[str, Any]]
    made: dict[str, Any] = field(default_factory=dict)

    def make(self, name: str) -> Any:
        """What a way makes, made once: for these examples, or of a way that needs none for all sizes."""
        if name == "base":
            return self.target
        way = WAYS[self.ways[name]["way"]]
        kept = self.known if way.is_free else self.made
        if name not in kept:
            if way.is_free and name not in self.aligned:
                self.aligned[name] = _prepare(self, self.ways[name], self.pair_key)
            kept[name] = way.make(self, self.ways[name] | {"name": name})
        return kept[name]


def _prepare(given: Given, row: Mapping[str, Any], key: jax.Array, **data: Sample) -> Prepared:
    return prepare_transport(
        named_key(key, row["method"]),
        partial(registry.symmetry_of, given.config),
        given.source,
        given.finetuned,
        given.target,
        method=row["method"],
        **data,
        **row.get("options", {}),
    )


def transport_freely(given, row):
    """A transport that needs no data; aligned once for all tasks."""
    ready = given.aligned[row["name"]]
    return apply_transport(replace(ready, task_vector=ready.move(given.finetuned)), given.target)


def transport_by_inputs(given, row):
    """A transport that looks at unlabelled inputs."""
    return apply_transport(_prepare(given, row, given.key, sample=given.sample.without_labels()), given.target)


def transport_by_labels(given, row):
    """A transport that looks at labelled examples."""
    return apply_transport(_prepare(given, row, given.key, sample=given.sample), given.target)


def distil(given, row):
    """The old base's fine-tune as teacher of the new base, or of what another way made of it."""
    start = given.make(row["start"])
    sample, kept = given.sample.without_labels(), given.keep if row.get("is_kept") else None
    options = dict(key=named_key(given.key, "distill"), base=given.target, support=kept) | row.get("options", {})
    return distill(sample, given.finetuned, start, **options).params


def polish(given, row):
    """What `--data` does after a transport: distillation at gentle rates, left out where it is not seen to help."""
    start = given.make(row["start"])
    as_moved = Prepared(task_vector(given.target, start), Spec({}, {}))
    kept = given.keep if row.get("is_kept") else None
    return polish_transport(
        named_key(given.key, "distill"),
        as_moved,
        start,
        given.finetuned,
        given.target,
        given.sample,
        polish="distill",
        keep=kept,
        **row.get("options", {}),
    )[0]


def tune_on_few(given, row):
    """The new base, or what another way made of it, fine-tuned on the labelled examples."""
    start = given.make(row["start"])
    return tune_few(given.sample, start, key=named_key(given.key, "few"), **row.get("options", {})).params


def add_logits(given, row):
    """The new base's logits plus what fine-tuning did to the old base's: three networks at every prediction."""
    del row
    proxy, together = with_proxy(given.sample, given.source, given.finetuned, given.target)
    forward = jax.jit(proxy.forward)
    return lambda batch: forward(together, inputs_of(batch))


def nearest_mean(given, row):
    """Nearest mean of the labelled examples' features, as the new base gives them, by cosine."""
    del row
    features = jax.jit(partial(registry.apply, given.config))

    def unit(batch):
        x = np.asarray(features(given.target, inputs_of(batch)), np.float64)
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    known, labels = unit(given.sample.batch), given.sample.batch["label"]
    num_classes = len(given.sample.forward.embeddings.array)
    means = np.stack([known[labels == c].sum(axis=0) for c in range(num_classes)])
    lengths = np.linalg.norm(means, axis=-1, keepdims=True)
    means = np.where(lengths > 0, means / np.maximum(lengths, 1e-12), 0.0)  # a class without examples is never nearest

    def predict(batch):
        return np.where(lengths[:, 0] > 0, unit(batch) @ means.T, -np.inf)

    return predict


WAYS = {
    "free transport": Way(transport_freely, is_free=True),
    "transport by inputs": Way(transport_by_inputs),
    "transport by labels": Way(transport_by_labels),
    "distil": Way(distil),
    "polish": Way(polish),
    "tune": Way(tune_on_few),
    "proxy logits": Way(add_logits),
    "nearest mean": Way(nearest_mean),
}
