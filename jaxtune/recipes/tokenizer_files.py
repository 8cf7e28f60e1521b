"""Tokenizer files with tokens added or taken out."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.checkpoint.files import parse_object, read_small
from jaxtune.errors import CheckpointError

FAST, SLOW, SETTINGS = "tokenizer.json", "added_tokens.json", "tokenizer_config.json"
# All that belongs to a tokenizer; goes together, so that no file of one model stands beside those of another.
NAMES = (
    FAST, SLOW, SETTINGS, "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "bpe.codes", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def plain_entry(token: str) -> dict[str, Any]:
    """A token as tokenizer.json lists one that is added, found anywhere in a text."""
    return {
        "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False,
    }  # fmt: skip


def added_entries(side_files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Token -> its entry, of the tokens that were added to a tokenizer."""
    entries: dict[str, dict[str, Any]] = {}
    if SLOW in side_files:
        entries |= {token: plain_entry(token) for token in _read(side_files[SLOW])}
    if SETTINGS in side_files:
        listed = _read(side_files[SETTINGS]).get("added_tokens_decoder") or {}
        entries |= {entry["content"]: plain_entry(entry["content"]) | dict(entry) for entry in listed.values()}
    if FAST in side_files:
        listed = _read(side_files[FAST]).get("added_tokens") or []
        entries |= {entry["content"]: plain_entry(entry["content"]) | dict(entry) for entry in listed}
    return entries


def write_tokenizer(
    side_files: Mapping[str, Path], added: Sequence[Mapping[str, Any]], dropped: Collection[str]
) -> dict[str, Path | bytes]:
    """The tokenizer files of a model with other tokens: name -> where to copy from, or content.

    Args:
        side_files: Of the model; others than `NAMES` are left out.
        added: Entries with their row under "id".
        dropped: Tokens that have no row in the result.

    Raises:
        CheckpointError: tokens would have to be taken out of a file of another kind than tokenizer.json.
    """
    files: dict[str, Path | bytes] = {name: place for name, place in side_files.items() if name in NAMES}
    if not added and not dropped:
        return files
    if FAST in files:
        files[FAST] = _encode(_change_fast(files[FAST], added, dropped))
    elif dropped:
        raise CheckpointError(
            f"{sorted(dropped)[0]!r} and {len(dropped) - 1} more tokens have no row, and can only be taken out of a "
            f"{FAST}. Save the tokenizer in the fast format first."
        )
    if SLOW in files or FAST not in files:
        own = _read(files[SLOW]) if SLOW in files else {}
        kept = {token: row for token, row in own.items() if token not in dropped}
        files[SLOW] = _encode(kept | {entry["content"]: entry["id"] for entry in added})
    if SETTINGS in files:
        settings = _read(files[SETTINGS])
        listed = settings.get("added_tokens_decoder")
        if listed is not None:
            kept = {row: entry for row, entry in listed.items() if entry.get("content") not in dropped}
            more = {str(entry["id"]): {flag: entry[flag] for flag in FLAGS} for entry in added}
            settings["added_tokens_decoder"] = kept | more
            files[SETTINGS] = _encode(settings)
    return files


def _change_fast(place, added, dropped) -> dict[str, Any]:
    content = _read(place)
    listed = [entry for entry in content.get("added_tokens") or [] if entry.get("content") not in dropped]
    content["added_tokens"] = listed + [
        {"id": entry["id"], **{flag: entry[flag] for flag in sorted(FLAGS)}} for entry in added
    ]
    model = content["model"]
    gone = set(dropped) & set(model["vocab"]) if isinstance(model.get("vocab"), dict) else set()
    if isinstance(model.get("vocab"), list) and any(pair[0] in dropped for pair in model["vocab"]):
        model["vocab"] = [pair for pair in model["vocab"] if pair[0] not in dropped]
    if gone:
        model["vocab"] = {token: row for token, row in model["vocab"].items() if token not in gone}
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not _touches(merge, gone)]
    return content


def _touches(merge, tokens) -> bool:
    first, _, last = (merge[0], "", merge[1]) if isinstance(merge, list) else merge.partition(" ")
    return first in tokens or last in tokens or first + last in tokens


def _read(place) -> dict[str, Any]:
    data = place if isinstance(place, bytes) else read_small(place)
    return parse_object(data, str(place) if not isinstance(place, bytes) else "a tokenizer file")


def _encode(content) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
