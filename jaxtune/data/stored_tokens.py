"""The tokenizer that lies beside a model's weights, for texts that the model is to read."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtune.errors import DataError

TOKENIZER_NAME = "tokenizer.json"


def read_tokenizer(folder: str | Path, *, max_length: int | None = None) -> Callable[[Sequence[str]], list[list[int]]]:
    """Texts -> rows of ids, each of its own length, as the model was trained on.

    Args:
        folder: Of the checkpoint; its tokenizer.json is read by the library `tokenizers`, which runs nothing of it.
        max_length: Longer texts lose their last tokens.

    Raises:
        DataError: no such file, a damaged one, or the library is missing.
    """
    path = Path(folder) / TOKENIZER_NAME
    if not path.is_file():
        raise DataError(
            f"{folder}: there is no {TOKENIZER_NAME}, so texts cannot become this model's tokens. Save the fast "
            "tokenizer beside the weights, or give token ids from Python (jaxtune.sampling.make_text_sample)."
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(f"reading {path} needs the library tokenizers: pip install jaxtune[text].") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{path}: not a tokenizer that the library tokenizers reads: {error}.") from error
    tokenizer.no_padding()
    if max_length is not None:
        tokenizer.enable_truncation(max_length)

    return lambda texts: [one.ids for one in tokenizer.encode_batch(list(texts))]
