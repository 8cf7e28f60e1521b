"""LoRA factors on disk: adapter.safetensors, and adapter_config.json that says how they are to be added to what."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.checkpoint.formats import Layout, StoredFile, load
from jaxtune.checkpoint.output import make_layout, write_checkpoint
from jaxtune.errors import CheckpointError
from jaxtune.types import Params

ADAPTER_TYPE = "jaxtune_lora"
WEIGHTS_NAME, CONFIG_NAME = "adapter.safetensors", "adapter_config.json"
FIELDS = ("adapter_type", "rank", "alpha", "is_rank_stabilised", "scale", "patterns", "base", "base_sha256")


def write_adapter(
    folder: Path,
    factors: Params,
    *,
    rank: int,
    alpha: float,
    is_rank_stabilised: bool,
    scale: float,
    patterns: Sequence[str],
    base: str,
    base_sha256: Mapping[str, str],
) -> None:
    """Writes both files into a folder that `checkpoint.publish` yielded.

    Args:
        folder: Where to.
        factors: As `init_lora` makes them; tensors are named by their paths.
        rank, alpha, is_rank_stabilised, patterns: What they were made with.
        scale: Of `lora_scale`: the merged kernel is base + scale * a @ b.
        base: Where the base was, for the reader.
        base_sha256: File of the base -> digest, as `hash_checkpoint` gives them.

    Raises:
        OSError: the disk refused.
    """
    config = {
        "adapter_type": ADAPTER_TYPE,
        "rank": rank,
        "alpha": alpha,
        "is_rank_stabilised": is_rank_stabilised,
        "scale": scale,
        "patterns": list(patterns),
        "base": base,
        "base_sha256": dict(base_sha256),
    }
    (weights,) = make_layout(factors, config).files
    write_checkpoint(folder, factors, Layout((StoredFile(WEIGHTS_NAME, weights.header),)))
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: str | Path) -> tuple[Params, dict[str, Any]]:
    """The factors, ready for `merge_lora`, and the content of adapter_config.json.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of another program.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: cannot be read: {error}. Name the folder that holds {WEIGHTS_NAME}."
        ) from error
    if not isinstance(config, dict) or config.get("adapter_type") != ADAPTER_TYPE or config.keys() != set(FIELDS):
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: not an adapter of ours, which has exactly these fields: {', '.join(FIELDS)}, "
            f"and adapter_type {ADAPTER_TYPE!r}."
        )
    return load(folder / WEIGHTS_NAME, config={}).params, config
