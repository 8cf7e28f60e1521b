"""Which token each row of an embedding stands for, read from the tokenizer files beside the weights."""

import json
from collections.abc import Mapping
from pathlib import Path

from jaxtune.checkpoint.files import parse_object, read_small
from jaxtune.errors import CheckpointError

TOKENIZER_NAMES = ("tokenizer.json", "vocab.json", "vocab.txt")
ADDED_NAMES = ("added_tokens.json",)


def read_tokens(side_files: Mapping[str, Path | bytes]) -> dict[str, int] | None:
    """Token -> row, from the first tokenizer file there is: tokenizer.json, vocab.json, vocab.txt.

    Args:
        side_files: Name -> where to read it, or what it holds, of one checkpoint.

    Returns:
        None where there is no such file (a sentencepiece model alone is not read).

    Raises:
        CheckpointError: a file is damaged, or gives one row two tokens.
    """
    name = next((name for name in TOKENIZER_NAMES if name in side_files), None)
    if name is None:
        return None
    place, data = _read(name, side_files)
    if name == "vocab.txt":
        tokens = _read_lines(place, data)
    else:
        content = parse_object(data, str(place))
        tokens = _of_tokenizer(place, content) if name == "tokenizer.json" else _check_rows(place, content)
    for added in ADDED_NAMES:
        if added in side_files:
            where, data = _read(added, side_files)
            tokens = tokens | _check_rows(where, parse_object(data, str(where)))
    rows: dict[int, str] = {}
    for token, row in tokens.items():
        if rows.setdefault(row, token) != token:
            raise CheckpointError(
                f"{place}: row {row} stands for {rows[row]!r} and for {token!r}. Use the tokenizer of this checkpoint."
            )
    return tokens


def _read(name, side_files):
    """(what messages call it, content)."""
    place = side_files[name]
    return (name, place) if isinstance(place, bytes) else (place, read_small(place))


def _read_lines(place, data):
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{place}: not UTF-8 text: {error.reason} at byte {error.start}.") from error
    if lines and not lines[-1]:
        lines.pop()
    # A line that repeats an earlier one has a row and no token of its own.
    tokens: dict[str, int] = {}
    for row, line in enumerate(lines):
        tokens.setdefault(line.rstrip("\r"), row)
    return tokens


def _of_tokenizer(place, content):
    """Of a tokenizer.json: the model's vocabulary and the tokens added to it."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [token, score], the row is the position
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in vocabulary):
            raise CheckpointError(f"{place}: model.vocab: expected [token, score] pairs.")
        tokens = {pair[0]: row for row, pair in enumerate(vocabulary)}
    elif isinstance(vocabulary, dict):
        tokens = _check_rows(place, vocabulary)
    else:
        raise CheckpointError(f"{place}: expected model.vocab, a dict of token -> row or a list of [token, score].")
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise CheckpointError(f"{place}: added_tokens: expected a list of objects.")
    own = _check_rows(place, {entry.get("content"): entry.get("id") for entry in added})
    # An added token may rename the row of a reserved one.
    renamed = set(own.values())
    return {token: row for token, row in tokens.items() if row not in renamed} | own


def _check_rows(place, tokens):
    """A dict of token -> row."""
    for token, row in tokens.items():
        if not isinstance(token, str) or type(row) is not int or row < 0:
            raise CheckpointError(f"{place}: {json.dumps(token)}: expected a token and its row, found {row!r}.")
    return tokens
