"""What of two models' configs makes a merge impossible, and what a reader should know of."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.checkpoint.files import read_small
from jaxtune.checkpoint.vocabulary import TOKENIZER_NAMES, read_tokens
from jaxtune.errors import CheckpointError
from jaxtune.recipes.opening import Opened

# Fields that change what the same tensors compute, so that an average of them means nothing.
STRUCTURE = (
    "num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "head_dim", "kv_channels", "hidden_act",
    "hidden_activation", "activation_function", "num_experts_per_tok", "patch_size", "feed_forward_proj",
)  # fmt: skip
# Fields in which released fine-tunes do differ from their bases; the result has those of the output's config.
ROTARY = (
    "rope_theta", "rope_scaling", "rope_parameters", "rope_type", "rotary_pct", "rotary_emb_base",
    "partial_rotary_factor", "rope_local_base_freq", "original_max_position_embeddings", "factor",
)  # fmt: skip
NORMS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
OTHERS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "scale_embedding", "logit_scale")
SIZES = ("hidden_size", "intermediate_size", "n_embd", "d_model", "d_ff", "n_inner")


def compare_configs(out: Opened, others: Iterable[Opened]) -> tuple[list[str], list[str]]:
    """(problems, notes) of models that go into one, against the one that gives the output its config.

    Differences in rotary base, norm epsilon and windows are notes: merges of published models have them, the result
    is a network, and its config says with which value.
    """
    problems: list[str] = []
    notes: list[str] = []
    ours = flatten_config(out.config)
    _check_quantised(out, problems)
    for other in others:
        _check_quantised(other, problems)
        theirs = flatten_config(other.config)
        if out.kind != other.kind and not _is_overridden(out, other):
            problems.append(
                f"architecture: {out.label} is {_name(out)}, {other.label} is {_name(other)}. If they are the same "
                f"network under two names, write {{model: {{path: {other.label}}}, override_architecture: CLASS}}."
            )
            continue
        for field in sorted(ours.keys() | theirs.keys()):
            last = field.split(".")[-1]
            both = ours.get(field), theirs.get(field)
            if both[0] == both[1]:
                continue
            words = f"{field}: {out.label} {both[0]!r}, {other.label} {both[1]!r}"
            if last in (*STRUCTURE, *SIZES) and None not in both:
                problems.append(words)
            elif last in ROTARY:
                notes.append(f"rotary positions differ in {words}; the result has {both[0]!r}")
            elif last in NORMS:
                notes.append(f"norms differ in {words}; the result has {both[0]!r}")
            elif last in OTHERS:
                notes.append(f"configs differ in {words}; the result has {both[0]!r}")
    return problems, notes


def compare_dtypes(out: Opened, others: Sequence[Opened]) -> list[str]:
    """A note where models are stored in different dtypes."""
    found = {model.label: ", ".join(sorted(_dtypes(model))) for model in (out, *others)}
    if len(set(found.values())) < 2:
        return []
    return ["stored dtypes differ: " + "; ".join(f"{label} {dtypes}" for label, dtypes in found.items())]


def compare_tokens(out: Opened, others: Iterable[Opened]) -> list[str]:
    """Notes on models with as many rows and other tokens, whose rows are merged by their number all the same."""
    notes = []
    for other in others:
        files = [_tokenizer_of(model) for model in (out, other)]
        if not out.rows or not other.rows or None in files or _is_same_file(*files):
            continue
        try:
            ours, theirs = (read_tokens(model.side_files) or {} for model in (out, other))
        except CheckpointError as error:
            notes.append(f"tokenizers are not compared: {error}")
            continue
        words = {row: token for token, row in ours.items()}
        odd = sorted((row, token) for token, row in theirs.items() if words.get(row, token) != token)
        if odd:
            row, token = odd[0]
            notes.append(
                f"tokenizers differ in {len(odd)} rows, and rows are merged by number: row {row} is {words[row]!r} in "
                f"{out.label} and {token!r} in {other.label}. If that is not meant, write tokenizer_source: union"
            )
    return notes


def _tokenizer_of(model):
    place = next((model.side_files[name] for name in TOKENIZER_NAMES if name in model.side_files), None)
    return place if isinstance(place, Path) else None


def _is_same_file(first, second) -> bool:
    return first.stat().st_size == second.stat().st_size and read_small(first) == read_small(second)


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of a config.json, keys apart by "."; what releases of transformers spell in two ways is spelt in one."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("rope_scaling", "rope_parameters") and isinstance(value, Mapping):
            flat |= {f"{prefix}rope.{inner}": one for inner, one in value.items()}
            if "rope_theta" in value:
                flat[f"{prefix}rope_theta"] = flat.pop(f"{prefix}rope.rope_theta")
        elif isinstance(value, Mapping):
            flat |= flatten_config(value, f"{prefix}{key}.")
        elif key in ("rope_scaling", "rope_parameters") and value is None:
            continue
        else:
            flat[prefix + key] = value
    for key in (f"{prefix}rope.rope_type", f"{prefix}rope.type"):
        if flat.get(key) == "default":
            del flat[key]
    return flat


def _check_quantised(model, problems):
    if model.config.get("quantization_config"):
        problems.append(
            f"{model.label}: its weights are quantised (quantization_config in config.json), and codes cannot be "
            "merged. Give the model before it was quantised."
        )


def _dtypes(model):
    return {str(dtype) for dtype in {info.dtype for info in model.tensors.values()} if dtype.kind not in "iub"}


def _is_overridden(*models):
    """Whether a recipe says that one is of the class of the other."""
    classes = [tuple(model.config.get("architectures") or ()) for model in models]
    return len(set(classes)) == 1 and classes[0] != ()


def _name(model):
    return " ".join([str(model.kind), *(f"({name})" for name in model.config.get("architectures") or ())])
