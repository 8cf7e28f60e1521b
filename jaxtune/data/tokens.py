"""Texts as numbers, without a download: words learnt on training texts, bytes, or characters."""

import functools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxtune.data.text_files import TextFile, read_text_file
from jaxtune.errors import DataError

TOKENS = ("words", "bytes", "characters")
PAD_ID = 0
WORD = re.compile(r"\w+|[^\w\s]")

# Texts -> one row of ids a text, with whatever start and end the checkpoint wants.
Tokenizer = Callable[[Sequence[str]], Sequence[Sequence[int]] | np.ndarray]


class Tokens(Protocol):
    """A way to number texts.

    Attributes:
        vocab_size: Ids lie below.
        start, end: Ids put around a text; None for none.
    """

    vocab_size: int
    start: int | None
    end: int | None

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without start and end."""


class Words:
    """Lower-cased words and signs: the most frequent of some texts by rank, all others by a hash.

    Ids: 0 padding, then `num_hashed` shared by the words that are not known, then the known ones, last start and end;
    the end is the greatest, where the text tower of CLIP pools. The hash is a crc32: the same in every process.

    Args:
        texts: To learn from.
        vocab_size: Of all ids; what the texts do not fill stays unused.
        num_hashed: At least 1.

    Raises:
        DataError: no room for a single word.
    """

    def __init__(self, texts: Iterable[str], *, vocab_size: int, num_hashed: int):
        room = vocab_size - num_hashed - 3
        if num_hashed < 1 or room < 1:
            raise DataError(
                f"vocab_size {vocab_size} with num_hashed {num_hashed} leaves room for {room} words; "
                "num_hashed is at least 1, and vocab_size at least num_hashed + 4."
            )
        counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[:room]
        self.ids = {word: 1 + num_hashed + rank for rank, word in enumerate(ranked)}
        self.vocab_size, self._num_hashed = vocab_size, num_hashed
        self.start, self.end = vocab_size - 2, vocab_size - 1

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the words of every text."""
        return [[self._number(word) for word in WORD.findall(text.lower())] for text in texts]

    def _number(self, word):
        return self.ids[word] if word in self.ids else 1 + zlib.crc32(word.encode()) % self._num_hashed


class Bytes:
    """UTF-8 bytes as 1 … 256, start 257, end 258, padding 0: the ids of `models.tokenizer`."""

    vocab_size, start, end = 259, 257, 258

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the bytes of every text."""
        return [[byte + 1 for byte in text.encode()] for text in texts]


class Characters:
    """The characters of some texts, in the order of their code points: 0 padding, 1 any other, then these.

    Args:
        texts: To learn from.
    """

    start = end = None

    def __init__(self, texts: Iterable[str]):
        known = sorted(set().union(*texts))
        self.ids = {character: 2 + rank for rank, character in enumerate(known)}
        self.vocab_size = 2 + len(known)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the characters of every text."""
        return [[self.ids.get(character, 1) for character in text] for text in texts]


class Given:
    """A tokenizer of the caller's, which puts start and end itself.

    Args:
        tokenizer: Texts -> rows of ids.
        pad_id: Put behind texts by `pad_tokens`.
        is_padded: Whether the tokenizer puts them there itself: trailing ones are then no part of a row. Many a
            vocabulary has a word at that id, so of rows of their own lengths nothing may be cut.

    Attributes:
        vocab_size: Past the greatest id met; a tokenizer that is only a function does not say.
    """

    start = end = None

    def __init__(self, tokenizer: Tokenizer, pad_id: int = PAD_ID, *, is_padded: bool = True):
        self._tokenizer, self._pad_id, self._is_padded = tokenizer, pad_id, is_padded
        self.vocab_size = pad_id + 1

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text.

        Raises:
            DataError: the tokenizer gives anything but a row of ids for each.
        """
        rows = [np.asarray(row) for row in self._tokenizer(list(texts))]
        if len(rows) != len(texts) or any(row.ndim != 1 or (row.size and row.dtype.kind not in "iu") for row in rows):
            raise DataError(f"the tokenizer made {len(rows)} rows of {len(texts)} texts, not a row of ids for each.")
        if self._is_padded:
            rows = [row[: np.max(np.flatnonzero(row != self._pad_id), initial=-1) + 1] for row in rows]
        kept = [row.tolist() for row in rows]
        self.vocab_size = max([self.vocab_size, *(max(row) + 1 for row in kept if row)])
        return kept


def learn_tokens(
    kind: str, vocabulary: str | Path | Sequence[str | Path], *, vocab_size: int, num_hashed: int
) -> Tokens:
    """The numbering of a kind, learnt on the train texts of files where it has to be.

    Args:
        kind: One of `TOKENS`.
        vocabulary: A file, or several.
        vocab_size, num_hashed: Of "words".

    Raises:
        DataError: a file cannot be read, or there are no train texts; no room for a word.
    """
    if kind == "bytes":
        return Bytes()
    paths = (vocabulary,) if isinstance(vocabulary, str | Path) else vocabulary
    return _learn(kind, tuple(read_text_file(path) for path in paths), vocab_size, num_hashed)


@functools.lru_cache(maxsize=8)  # the tasks and splits of one file are opened one after another
def _learn(kind: str, files: tuple[TextFile, ...], vocab_size: int, num_hashed: int) -> Tokens:
    texts = [record.text for file in files for record in file.of("train")]
    if not texts:
        raise DataError(f"{', '.join(str(file.path) for file in files)}: no train texts to learn a vocabulary on.")
    return Characters(texts) if kind == "characters" else Words(texts, vocab_size=vocab_size, num_hashed=num_hashed)


def pad_tokens(
    rows: Sequence[Sequence[int]], length: int, tokens: Tokens, *, pad_id: int = PAD_ID
) -> tuple[np.ndarray, np.ndarray, int]:
    """Start, text, end, padding; longer texts lose their last tokens, not their end.

    Shapes:
        result: int32[N, length], bool[N, length] True where a token is real, and how many texts were cut.
    """
    before, after = ([] if id is None else [id] for id in (tokens.start, tokens.end))
    room = length - len(before) - len(after)
    text, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for values, is_real, row in zip(text, mask, rows, strict=True):
        whole = [*before, *row[:room], *after]
        values[: len(whole)], is_real[: len(whole)] = whole, True
    return text, mask, sum(len(row) > room for row in rows)
