"""Which tensors have a row a token, by their names and shapes."""

import re
from collections.abc import Mapping
from typing import Any

# Tables that turn tokens into vectors, and heads that turn vectors into tokens.
TABLE = re.compile(
    r"(^|[./])((embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|token_embedding|shared)\.weight|embed/token)$"
)
HEAD = re.compile(
    r"(^|[./])((lm_head|embed_out|lm_head\.decoder|predictions\.decoder|vocab_projector)\.(weight|bias)"
    r"|lm_head\.bias|predictions\.bias|head/(kernel|bias))$"
)


def find_table(tensors: Mapping[str, Any]) -> str | None:
    """The first table of tokens."""
    return next((name for name in tensors if TABLE.search(name)), None)


def find_vocabulary(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Name of every tensor with a row a token -> the axis that counts tokens.

    A head counts only where it is as long as the table, so that a classifier's is none.
    """
    table = find_table(tensors)
    if table is None:
        return {}
    size = tensors[table].shape[0]
    axes = {}
    for name, info in tensors.items():
        if TABLE.search(name) or HEAD.search(name):
            axis = 1 if name.endswith("head/kernel") else 0
            if len(info.shape) > axis and info.shape[axis] == size:
                axes[name] = axis
    return axes
