"""What adapter_config.json may say: what we compute as PEFT does, and what is refused by name."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtune.errors import ConfigError

# Fields that say how factors are added, or nothing about what the adapted network computes.
READ = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "bias",
    "ensure_weight_tying",
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# Ways to start that leave the base as it is; the others (pissa, olora, corda, loftq, lora_ga) rewrite it.
STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# What some of the refused fields are, for the message.
MEANINGS = {
    "alora_invocation_tokens": "the adapter acts on some tokens only",
    "layer_replication": "blocks are repeated",
    "lora_bias": "biases of the factors",
    "megatron_config": "layers of Megatron",
    "target_parameters": "factors of whole stacks of experts",
    "trainable_token_indices": "single rows of the token table",
    "use_dora": "DoRA, which rescales the columns of the merged weights",
}


def check_config(values: Mapping[str, Any], where: str) -> None:
    """Checks that the adapter is a plain LoRA.

    Args:
        values: adapter_config.json as parsed.
        where: Its path, for the message.

    Raises:
        ConfigError: another type of adapter, a field that changes what is computed and is not supported, or one that
            makes no sense; names it.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f'{where}: "peft_type" is {kind!r}; only "LORA" is read. Merge the adapter into its base with the library '
            "that wrote it, and give the merged folder."
        )
    lines = [
        f"  {name}: {value!r}" + (f" ({MEANINGS[name]})" if name in MEANINGS else "")
        for name, value in values.items()
        if name not in READ and value not in (None, False, {}, [], "")
    ]
    start = values.get("init_lora_weights", True)
    if not any(start is choice or (isinstance(start, str) and start == choice) for choice in STARTS):
        lines.append(f"  init_lora_weights: {start!r} (the base was rewritten before training)")
    if lines:
        raise ConfigError(
            f"{where}: this LoRA computes more than base + scale * B A, in fields that are not supported:\n"
            + "\n".join(lines)
            + "\nMerge it into its base with the library that wrote it, and give the merged folder."
        )
    odd = [f"  {name}: {value!r}, {complaint}" for name, value, complaint in _oddities(values)]
    if odd:
        raise ConfigError(f"{where}: does not make sense:\n" + "\n".join(odd))


def find_rank(values: Mapping[str, Any], module: str) -> int:
    """Inner size of the factors of `module`: of the first matching pattern, or the common one."""
    return _match(values.get("rank_pattern"), module, values["r"])


def find_scale(values: Mapping[str, Any], module: str) -> float:
    """What the product of the factors of `module` is multiplied by: alpha / r, or alpha / sqrt(r).

    Reference:
        Hu et al. 2021, arXiv:2106.09685; the root: Kalajdzievski 2023, arXiv:2312.03732.
    """
    rank, alpha = find_rank(values, module), _match(values.get("alpha_pattern"), module, values["lora_alpha"])
    return alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank


def is_targeted(values: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts factors on `module` when it loads the adapter; others in the file it would ignore."""
    if _is_named(values.get("exclude_modules"), module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in values.get("modules_to_save") or ()):
        return False
    targets = values.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if not _is_named(targets, module):
        return False
    layers = values.get("layers_to_transform")
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    patterns = values.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The first number behind a named list of layers: a later one counts experts.
    formulas = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for formula in formulas if (match := re.match(formula, module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _is_named(names: str | Iterable[str] | None, module):
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _match(patterns, module, default):
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _oddities(values):
    """(field, value, complaint) of every field whose value we could not use."""
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not _is_number(rank) or rank < 1 or rank != int(rank):
        yield "r", rank, "expected a rank, at least 1"
    if not _is_number(alpha):
        yield "lora_alpha", alpha, "expected a number"
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(field) or {}
        if not isinstance(patterns, Mapping):
            yield field, patterns, "expected patterns and numbers"
            continue
        for pattern, value in patterns.items():
            if not _is_number(value) or (field == "rank_pattern" and (value < 1 or value != int(value))):
                yield f"{field}[{pattern!r}]", value, "expected a number"
            yield from _check_pattern(field, pattern)
    for field in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        names = values.get(field)
        for name in [names] if isinstance(names, str) else names if isinstance(names, list) else []:
            if not isinstance(name, str):
                yield field, name, "expected the name of a module"
            elif isinstance(names, str) or field in ("modules_to_save", "layers_pattern"):
                yield from _check_pattern(field, name)
        if not isinstance(names, str | list | None):
            yield field, names, "expected names of modules"


def _check_pattern(field, pattern):
    try:
        re.compile(pattern)
    except re.error as error:
        yield field, pattern, f"no regular expression: {error}"


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
