"""Text as bytes: a tokenizer with no vocabulary file.

Real CLIP weights need the byte-pair tokenizer that they were trained with; whatever takes a list of
strings and returns int32[N, L] stands in for `tokenize`.
"""

from collections.abc import Sequence

import numpy as np

from jaxtune.errors import DataError

PAD_ID = 0
START_ID = 257  # bytes are 1..256
END_ID = 258  # the greatest: the text tower pools where the greatest id stands
VOCAB_SIZE = 259


def tokenize(texts: Sequence[str], *, context_length: int) -> np.ndarray:
    """Start, the text's UTF-8 bytes, end, padding.

    Shapes:
        result: int32[N, context_length].

    Raises:
        DataError: a text that does not fit; nothing is cut off silently.
    """
    tokens = np.full((len(texts), context_length), PAD_ID, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START_ID, *(byte + 1 for byte in text.encode()), END_ID]
        if len(ids) > context_length:
            raise DataError(
                f"{text!r} takes {len(ids)} tokens with its start and end, the context holds {context_length}. "
                "Shorten the text, or use a text tower with a longer context."
            )
        row[: len(ids)] = ids
    return tokens
