"""What a merge writes beside its tensors: config.json and the files of the tokenizer, right for the result."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.recipes import chat
from jaxtune.recipes.architecture import get_field, with_field
from jaxtune.recipes.jobs import TensorJob
from jaxtune.recipes.opening import Opened
from jaxtune.recipes.parts import Part
from jaxtune.recipes.schema import Recipe
from jaxtune.recipes.tokenizer_files import NAMES, write_tokenizer
from jaxtune.recipes.tokenizers import Vocabulary
from jaxtune.recipes.vocabularies import find_table

VOCABULARY_FIELDS = ("vocab_size", "text_config.vocab_size", "text_cfg.vocab_size", "text.vocab_size")


def make_config(
    recipe: Recipe,
    models: Sequence[Opened],
    parts: Mapping[str, Sequence[Part]],
    out: Opened,
    vocabulary: Vocabulary | None,
    jobs: Sequence[TensorJob],
    notes: list[str],
) -> dict[str, Any]:
    """config.json of the output: the base's, with the dtype, numbers of layers and of tokens and ties of the result.

    Args:
        models: All of the recipe; `out` is the one that gives the output its layout.
        parts: Of every module.
        jobs: Of all tensors.
        notes: Takes what a reader should know.
    """
    config = dict(out.config)
    dtype = recipe.out_dtype or recipe.dtype
    found = {str(dtype) for dtype in {job.out_dtype for job in jobs} if dtype.kind not in "iub"}
    stored = {str(dtype) for dtype in {info.dtype for info in out.tensors.values()} if dtype.kind not in "iub"}
    if dtype is None and len(found) == 1:
        dtype = next(iter(found))
    for key in ("torch_dtype", "dtype"):
        if key in config and dtype is not None:
            config[key] = dtype
    if found != stored:
        notes.append(f"the result is stored in {', '.join(sorted(found))}, {out.label} in {', '.join(sorted(stored))}")
    for module, each in parts.items():
        stack = out.architecture.stacks[module]
        depth = sum(part.num_layers for part in each)
        if stack is None or depth == stack.num_layers:
            continue
        if stack.field is None:
            notes.append(f"{module}: {depth} layers instead of {stack.num_layers}, and config.json does not count them")
            continue
        config = with_field(config, stack.field, depth)
        config = _fit_layer_lists(config, stack, each, models, module)
    if vocabulary is not None:
        for field in VOCABULARY_FIELDS:
            if get_field(config, field) is not None:
                config = with_field(config, field, vocabulary.num_rows)
        theirs = models[vocabulary.files_of].config
        if theirs is not out.config:
            config |= {key: value for key, value in theirs.items() if key.endswith("_token_id") and key in config}
    by_name = {job.name: (job.sources, job.base) for job in jobs}
    heads = [name for name, same in out.ties.items() if name in by_name and by_name[name] != by_name.get(same)]
    tied = [model.label for model in models if model.ties]
    if heads or (not out.ties and tied and find_table(out.tensors)):
        notes.append(
            f"tied embeddings: {', '.join(tied)} repeat the table in the head and others do not; the result has a head "
            "of its own"
        )
    if heads:
        config["tie_word_embeddings"] = False
    return config


def _fit_layer_lists(config, stack, each, models, module) -> dict[str, Any]:
    """Lists in config.json with an entry a layer (kinds of attention), taken along with their layers."""
    scope, _, _ = stack.field.rpartition(".")
    own = get_field(config, scope) if scope else config
    for key, value in list(own.items()):
        if not isinstance(value, list) or len(value) != stack.num_layers or stack.num_layers < 2:
            continue
        taken = []
        for part in each:
            source = part.sources[part.base or 0]
            theirs = get_field(models[source.index].config, f"{scope}.{key}" if scope else key)
            if not isinstance(theirs, list):
                break
            taken += theirs[source.first_layer : source.first_layer + part.num_layers]
        if len(taken) == sum(part.num_layers for part in each):
            config = with_field(config, f"{scope}.{key}" if scope else key, taken)
    return config


def choose_files(
    models: Sequence[Opened], out: Opened, vocabulary: Vocabulary | None, template: str | None, notes: list[str]
) -> dict[str, Any]:
    """Files beside the weights: the base's, its tokenizer perhaps another's or with other tokens.

    Args:
        template: For conversations; None keeps what the files say.
        notes: Takes what a reader should know.
    """
    files = dict(out.side_files)
    for name in list(files):
        if name.endswith(".md") or name == "mergekit_config.yml":  # a card of its own is written
            del files[name]
    if vocabulary is not None:
        donor = models[vocabulary.files_of]
        files = {name: place for name, place in files.items() if name not in NAMES}
        files |= write_tokenizer(donor.side_files, vocabulary.added, vocabulary.dropped)
        if donor is not out and "generation_config.json" in donor.side_files:
            files["generation_config.json"] = donor.side_files["generation_config.json"]
        if vocabulary.added:
            notes.append(f"tokenizer: {len(vocabulary.added)} tokens added to those of {donor.label}")
    if template is not None:
        if any(name in files for name in NAMES):
            chat.put_template(files, template)
        else:
            notes.append("chat_template: there is no tokenizer that it could belong to; it is left out")
    return files
