"""Several fine-tunes become one model by what examples say: `jaxtune.compose`, on checkpoints, paths or trees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.data.source import DataSource
from jaxtune.errors import ConfigError
from jaxtune.loading import Model, load, open_models
from jaxtune.sample import Sample

# Methods that choose among finished models, or weigh them: by examples that none of the models was fitted to.
CHOOSERS = ("best_k_soup", "greedy_soup", "learned_soup", "lines", "uniform_soup")

Examples = Sample | DataSource | str | Path


def compose(
    method: str,
    base: Model,
    finetuned: Sequence[Model],
    samples: Sequence[Examples] | Examples,
    *,
    config: Any = None,
    num_examples: int | None = None,
    split: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Makes one model of several fine-tunes of one base by what examples say.

    Args:
        method: A key of `jaxtune.compose.registry.METHODS`.
        base: What all were fine-tuned from: a tree, a checkpoint, or the path of one.
        finetuned: The models.
        samples: Of each model's task, in the order of the models (one for all where the method takes one): samples,
            data sources, or what `data.open_source` opens.
        config: Architecture of bare trees; samples that are ready need none.
        num_examples: Of each source that is opened, at most so many; None: all.
        split: Of sources that are opened; None: "validation" for methods that choose among finished models or weigh
            them (`CHOOSERS`), which a source must then hold, and "train" for all others. A validation split that a file
            does not hold is cut from train where it is asked for.
        seed: Of the draw of examples and of the method.
        **options: The method's own.

    Returns:
        A `Composition`: its `params` is a tree of the base's dtypes.

    Raises:
        UnknownNameError: no such method, or no such option of it.
        ConfigError: the architecture is unknown, or the models differ in it.
        JaxtuneError: models or examples do not fit.
    """
    from jaxtune.compose.registry import compose as run
    from jaxtune.opening import open_examples

    several = [samples] if isinstance(samples, Sample | DataSource | str | Path) else list(samples)
    named = {f"model {n}": model for n, model in enumerate(finetuned)} | {"base": base}
    named = {role: load(model) if isinstance(model, str | Path) else model for role, model in named.items()}
    read_by = [named["base"], *named.values()]  # texts: by the tokenizer of the base, where it has one
    trees, config = open_models(named, config)
    ready = []
    for one in several:
        if not isinstance(one, Sample):
            if config is None:
                raise ConfigError("pass config= (a model config or its dict): bare trees do not say what they compute.")
            one = open_examples(
                config, one, models=read_by, split=split or ("validation" if method in CHOOSERS else "train"),
                is_cut_refused=split is None, num_examples=num_examples, seed=seed,
            )  # fmt: skip
        ready.append(one)
    base = trees.pop("base")
    return run(method, base, list(trees.values()), ready, seed=seed, **options)
