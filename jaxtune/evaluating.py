"""How good models are, on checkpoints, paths or trees: `jaxtune.evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.data.source import open_source
from jaxtune.data.text_files import SUFFIXES
from jaxtune.errors import ConfigError
from jaxtune.evaluate.candidates import one_candidate, stack_candidates
from jaxtune.evaluate.classifier import Metrics, evaluate_classifier
from jaxtune.evaluate.language import TextMetrics, evaluate_texts
from jaxtune.evaluate.many import evaluate_many
from jaxtune.loading import Model, load, open_models
from jaxtune.models.readout import frozen_readout
from jaxtune.opening import open_examples
from jaxtune.sample import Sample
from jaxtune.sampling import Forward, Frozen, num_outputs, predicts_tokens


def evaluate(
    model: Model | Sequence[Model],
    source: Any,
    *,
    config: Any = None,
    split: str = "test",
    embeddings: Any = None,
    **options: Any,
) -> Metrics | TextMetrics | list[Metrics] | list[TextMetrics]:
    """Accuracy and loss of a model on a data source, or perplexity on a sample of texts.

    Args:
        model: What is measured; several of one architecture are evaluated in one program.
        source: A data source, a name or path for `data.open_source`, or a `Sample`, which knows how it is read. Texts
            of a path are read by the model's own tokenizer.
        config: Architecture of a bare tree; a sample needs none.
        split: Of a source that is opened here. One that it does not have is an error: nothing else is taken instead.
        embeddings: float32[C, D], a frozen read-out, for a source; for CLIP those of `zero_shot_embeddings`. None:
            outputs are one a class, or, of a model with another number of them, read by the names of the classes
            (`models.readout.class_embeddings`).
        **options: `batch_size`; `top_k` for images; `at_a_time` and `memory` for several models and for samples, see
            `evaluate.score_many`.

    Returns:
        `Metrics` or, of a sample of texts, `TextMetrics`; a list for several models.

    Raises:
        ConfigError: the architecture is unknown, or there is no model.
        DataError: the source or its split is missing, is empty or does not fit the model.
        NonFiniteError: a model's outputs are NaN.
    """
    is_many = isinstance(model, Sequence) and not isinstance(model, str)
    models, names = (list(model), "model {}") if is_many else ([model], "model")
    if not models:
        raise ConfigError("there is no model to evaluate.")
    models = [load(one) if isinstance(one, str | Path) else one for one in models]
    trees, config = open_models({names.format(n): one for n, one in enumerate(models)}, config)
    candidates = stack_candidates(list(trees.values())) if is_many else one_candidate(trees["model"])
    if isinstance(source, str | Path) and str(source).endswith(SUFFIXES) and config is not None:
        source = open_examples(config, source, models=models, split=split, needs_labels=not predicts_tokens(config))
    if isinstance(source, Sample):
        if embeddings is not None:
            raise ConfigError("a sample has its read-out already; embeddings= goes with a source.")
        is_text = "label" in source.batch and source.batch["label"].ndim == 2
        found = (
            evaluate_texts(candidates, source, **options)
            if is_text
            else evaluate_many(candidates, source.forward, source, **options)
        )
        return found if is_many else found[0]
    if config is None:
        raise ConfigError("pass config= (a model config or its dict): a bare tree does not say what it computes.")
    if isinstance(source, str | Path):
        source = open_source(str(source), split)
    if embeddings is None:
        embeddings = frozen_readout(source.class_names, num_outputs(config))
    if not is_many:
        return evaluate_classifier(config, trees["model"], source, embeddings=embeddings, **options)
    forward = Forward(config, None if embeddings is None else Frozen(embeddings))
    return evaluate_many(candidates, forward, source, **options)
