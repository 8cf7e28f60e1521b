"""Rows that the key tables of encoders share."""

from collections.abc import Collection, Mapping

from jaxtune.models import encoder
from jaxtune.models.keys import LINEAR, Row


def dense_rows(stored: str, path: str) -> list[Row]:
    """A linear layer with its bias."""
    return [Row(f"{stored}.weight", f"{path}/kernel", LINEAR), Row(f"{stored}.bias", f"{path}/bias")]


def norm_rows(names: Collection[str], stored: str, path: str) -> list[Row]:
    """A layer norm; "gamma" and "beta" where it was written in the days of TensorFlow."""
    is_old = f"{stored}.gamma" in names
    gain, offset = ("gamma", "beta") if is_old else ("weight", "bias")
    return [Row(f"{stored}.{gain}", f"{path}/scale"), Row(f"{stored}.{offset}", f"{path}/bias")]


def attention_rows(config: encoder.Config, stored: Mapping[str, str], path: str) -> list[Row]:
    """Queries, keys, values and output, each a linear layer.

    Args:
        config: Number of heads.
        stored: "q", "k", "v", "out" -> stored name of the layer.
        path: Of the attention.
    """
    dims, rows = {"head": config.num_heads}, []
    for name in "qkv":
        rows += [
            Row(f"{stored[name]}.weight", f"{path}/{name}/kernel", "(head unit) in -> in head unit", dims),
            Row(f"{stored[name]}.bias", f"{path}/{name}/bias", "(head unit) -> head unit", dims),
        ]
    return [
        *rows,
        Row(f"{stored['out']}.weight", f"{path}/out/kernel", "out (head unit) -> head unit out", dims),
        Row(f"{stored['out']}.bias", f"{path}/out/bias"),
    ]


def vocabulary_rows(
    config: encoder.Config, names: Collection[str], *, table: str, decoder: str, biases: tuple[str, ...]
) -> tuple[list[Row], dict[str, str]]:
    """(rows, ties) of the last layer before the vocabulary.

    Args:
        config: Says whether it is tied.
        names: Of the stored tensors: what is tied may be stored as well.
        table, decoder: Stored names of the token table and of the layer's kernel.
        biases: Stored names of its bias, which some files have under two; the first is the usual one.
    """
    bias = next((name for name in biases if name in names), biases[0])
    rows, ties = [Row(bias, "head/bias")], {name: bias for name in biases if name != bias and name in names}
    if config.tied:
        return rows, {**ties, decoder: table}
    return [*rows, Row(decoder, "head/kernel", LINEAR)], ties
