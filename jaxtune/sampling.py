"""Samples of a task for a network: records checked against it, and how its outputs become logits."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.data import kinds
from jaxtune.data.parts import take_few, take_sample
from jaxtune.data.source import DataSource, may_lack_labels, open_source
from jaxtune.errors import ConfigError, DataError
from jaxtune.gradients import check_finite_inputs
from jaxtune.models import decoder, registry
from jaxtune.models.readout import class_embeddings, read_out
from jaxtune.sample import Sample, inputs_of
from jaxtune.tree import flatten
from jaxtune.types import Params

READ_OUTPUTS = ("logits", "features", "image_features", "pooled", "hidden")  # the first that a network has


class Frozen:
    """An array that is never changed and compares by what it holds, so that it can be part of a static argument."""

    def __init__(self, array: Any):
        self.array = np.ascontiguousarray(array)
        self.array.setflags(write=False)
        self._digest = hashlib.sha256(self.array.tobytes()).digest()

    def __hash__(self):
        return hash(self._digest)

    def __eq__(self, other):
        if not isinstance(other, Frozen):
            return NotImplemented
        return self._digest == other._digest and self.array.shape == other.array.shape


@dataclass(frozen=True)
class Forward:
    """Logits of a network: its outputs, or its features through a frozen read-out.

    Attributes:
        config: Of a model family.
        embeddings: float32[C, D], one row per class; None where the outputs are logits.
        is_next_token: Whether each position predicts the token behind it, so that the last predicts nothing.
        others: Configs of other sizes, for parameters that are not those of `config`.
    """

    config: Any
    embeddings: Frozen | None = None
    is_next_token: bool = False
    others: tuple[Any, ...] = ()

    def __call__(self, params: Params, batch: Mapping[str, Any]) -> jax.Array:
        outputs = what_is_said(registry.apply(_config_of(params, self.config, self.others), params, inputs_of(batch)))
        if self.is_next_token:
            outputs = outputs[:, :-1]
        return outputs if self.embeddings is None else read_out(outputs, self.embeddings.array)


@dataclass(frozen=True)
class Record:
    """What goes in and comes out of every matrix of a network, see `models.tap.record_matrices`.

    Attributes:
        config: Of a model family.
        others: Configs of other sizes, for parameters that are not those of `config`.
    """

    config: Any
    others: tuple[Any, ...] = ()

    def __call__(self, params: Params, batch: Mapping[str, Any]) -> dict[str, Any]:
        from jaxtune.models.tap import record_matrices

        return record_matrices(_config_of(params, self.config, self.others), params, inputs_of(batch))

    def gradients(self, loss: Any, params: Params, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The same with the gradient of a loss, (params, batch) -> float[], with respect to what every matrix makes."""
        from jaxtune.models.tap import record_gradients_of

        return record_gradients_of(loss, params, batch)


def what_is_said(outputs: Any) -> jax.Array:
    """Of a network with several outputs the one that is read as classes: CLIP's are the features of its images.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(outputs, Mapping):
        return outputs
    for name in READ_OUTPUTS:
        if name in outputs:
            return outputs[name]
    raise ConfigError(f"none of the outputs {', '.join(outputs)} is read as classes; known: {', '.join(READ_OUTPUTS)}.")


def for_sizes(sample: Sample, *configs: Any) -> Sample:
    """The same examples for networks of other sizes too: which config is meant is read off the parameters' shapes.

    For transports between networks of different width, which ask both about the same inputs.

    Raises:
        ConfigError: the sample asks a network in a way of its own, and not as `make_sample` does.
    """
    forward, record = sample.forward, sample.record
    if not isinstance(forward, Forward) or not isinstance(record, Record | None):
        raise ConfigError(f"{sample.name}: only samples of `sampling` can be asked of networks of several widths.")
    others = tuple(configs)
    return replace(
        sample,
        forward=replace(forward, others=others),
        record=None if record is None else replace(record, others=others),
    )


def _config_of(params, config, others):
    """The first config whose parameters look like these; `config` where none does, whose own error then says so."""
    if not others:
        return config
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    for one in (config, *others):
        own = jax.eval_shape(lambda key, one=one: registry.init(key, one), jax.random.key(0))
        if {path: leaf.shape for path, leaf in flatten(own).items()} == shapes:
            return one
    return config


def make_sample(
    config: Any,
    data: DataSource | str | Path,
    *,
    split: str = "train",
    num_examples: int | None = None,
    num_per_class: int | None = None,
    seed: int = 0,
    embeddings: Any = None,
    needs_labels: bool = False,
    **options: Any,
) -> Sample:
    """Examples of a task for networks of one architecture, drawn by chance.

    A network with as many outputs as there are classes is read as logits; any other through the frozen read-out, one
    fixed direction per class name, unless `embeddings` says another. Where the source knows no classes (images alone),
    the outputs are taken for logits.

    Args:
        config: Of a model family.
        data: A data source, or what `data.open_source` opens.
        split: Of a source that is opened here.
        num_examples: At most so many; None: all.
        num_per_class: At most so many of every class, instead.
        seed: Of the draw.
        embeddings: float32[C, D], a read-out of the caller's own.
        needs_labels: Whether a source without labels is refused.
        **options: Of a source that is opened here: `task="clinc_banking"`, for instance.

    Raises:
        DataError: the source is missing, empty, holds NaN, labels outside the classes, lacks labels that are needed, or
            holds records that the network does not take; names the source.
        ConfigError: both counts are given, or one below 1; the network has no outputs to be read.
    """
    if num_examples is not None and num_per_class is not None:
        raise ConfigError("give num_examples or num_per_class, not both.")
    for name, count in (("num_examples", num_examples), ("num_per_class", num_per_class)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1.")
    source = data
    if isinstance(data, str | Path):
        if may_lack_labels(data):
            options = {"allow_unlabelled": not needs_labels, **options}
        source = open_source(data, split, **options)
    elif options:
        raise ConfigError(f"options {', '.join(options)} are for a source that is opened here; this one is open.")
    if num_per_class is not None:
        source = take_few(source, num_per_class, seed=seed)
    elif num_examples is not None:
        source = take_sample(source, num_examples, seed=seed)
    where = f"{source.name} ({source.split})"
    if not len(source):
        raise DataError(f"{where}: there are no examples.")
    batch = {name: np.asarray(values) for name, values in source.__getitems__(np.arange(len(source))).items()}
    if needs_labels and "label" not in batch:
        raise DataError(
            f"{where}: the examples have no labels, and what is asked for needs them. Give each example its label, or "
            "take a method that needs none."
        )
    return _check(Sample(where, batch, _forward_for(config, source, embeddings, where), Record(config)), source)


def make_text_sample(
    config: Any, text: np.ndarray | DataSource, *, mask: np.ndarray | None = None, name: str | None = None
) -> Sample:
    """Texts for a language model: each token is to be predicted from those before it.

    Args:
        config: Of a model family that predicts the next token, see `predicts_tokens`.
        text: Token ids, or a source of texts (`data.open_source("x.jsonl.gz", split, windows=64)`), whose masks are
            taken too.
        mask: True where a token is real; None: all are.
        name: What reports call it; None: the source's, or "texts".

    Shapes:
        text: int[N, L], L at least 2; mask: bool[N, L].

    Raises:
        ConfigError: the network says something of whole texts; `make_sample` makes samples for it.
        DataError: no texts, another shape, or ids outside the model's vocabulary.
    """
    if not predicts_tokens(config):
        raise ConfigError(
            f"{name or getattr(text, 'name', 'texts')}: a {registry.config_to_dict(config)['model_type']} with head "
            f"{getattr(config, 'head', None)!r} does not predict the next token. make_sample makes samples for it."
        )
    if isinstance(text, DataSource):
        name = name or f"{text.name} ({text.split})"
        records = text.__getitems__(np.arange(len(text)))
        check_kind(name, config, records)
        text, mask = records["text"], records.get("mask", mask)
    name = name or "texts"
    text = np.asarray(text)
    if text.ndim != 2 or not len(text) or text.shape[1] < 2 or text.dtype.kind not in "iu":
        raise DataError(f"{name}: texts are {text.dtype}{list(text.shape)}, expected int[N, L] with L at least 2.")
    mask = np.ones(text.shape, bool) if mask is None else np.asarray(mask, bool)
    _check_ids(name, config, text)
    text = text.astype(np.int32)
    batch = {"text": text, "mask": mask, "label": text[:, 1:], "valid": mask[:, 1:] & mask[:, :-1]}
    return Sample(name, batch, Forward(config, is_next_token=True), Record(config))


def _forward_for(config, source, embeddings, where):
    if embeddings is not None:
        return Forward(config, Frozen(np.asarray(embeddings, np.float32)))
    width, names = num_outputs(config), source.class_names
    if not names:
        return Forward(config)
    if width is None:
        raise ConfigError(f"{where}: models of this family have no outputs that become classes; pass embeddings=.")
    return Forward(config, None if width == len(names) else Frozen(class_embeddings(names, width)))


def predicts_tokens(config: Any) -> bool:
    """Whether a network is a language model: every position says which token comes next."""
    return isinstance(config, decoder.Config) and config.head == "tokens"


def num_outputs(config: Any) -> int | None:
    """Length of what a network says about one example; None where it says nothing of the kind."""
    found = getattr(config, "num_outputs", None)
    return found if found is not None else getattr(config, "embed_dim", None) or getattr(config, "width", None)


def _check(sample, source):
    """The sample, seen to fit the network: one example is run through it, and every label is a class."""
    batch, names = sample.batch, source.class_names
    check_finite_inputs(sample)
    label = batch.get("label")
    if label is not None and (label.min() < 0 or label.max() >= len(names)):
        raise DataError(
            f"{sample.name}: labels {label.min()} to {label.max()}, there are {len(names)} classes. Leave the others "
            "out, or give class_names a name for each."
        )
    forward = sample.forward
    check_kind(sample.name, forward.config, batch)
    shape = _image_shape(forward.config)
    if "image" in batch and shape is not None:
        kinds.check_images(sample.name, batch["image"], shape)
    if "text" in batch:
        _check_ids(sample.name, forward.config, batch["text"])
    try:
        params = jax.eval_shape(lambda key: registry.init(key, forward.config), jax.random.key(0))
        logits = jax.eval_shape(forward, params, {name: values[:1] for name, values in inputs_of(batch).items()})
    except DataError as error:
        raise DataError(f"{sample.name}: {error}") from error
    if names and len(logits.shape) != 2:
        raise DataError(
            f"{sample.name}: the network says something of every part of an example, {list(logits.shape)}, and these "
            "are labels of whole examples. Give it a head for whole examples, or a pooler."
        )
    return sample


def check_kind(where: str, config: Any, held: Collection[str]) -> None:
    """Raises `DataError` where what examples hold ("image", "text") is not what a network takes.

    Args:
        where: What the error calls the examples.
        config: Of a model family.
        held: Names of what they hold.
    """
    kinds.check_kind(where, held, _image_shape(config), takes_text=registry.vocabulary_size(config) is not None)


def _image_shape(config):
    """(height, width, channels) of a network's images, None where any will do; None of one that takes no images."""
    tower = getattr(config, "vision", config)
    size, channels = getattr(tower, "image_size", None), getattr(tower, "channels", None)
    return getattr(tower, "image_shape", None) or (None if channels is None else (size, size, channels))


def _check_ids(where, config, text):
    """Raises `DataError` where token ids lie outside the vocabulary of the network."""
    size = registry.vocabulary_size(config)
    if size is not None and text.size and not 0 <= text.min() <= text.max() < size:
        raise DataError(
            f"{where}: token ids {text.min()} to {text.max()}, the vocabulary of the network has {size}. Use its own "
            "tokenizer, or tokens of that size."
        )
