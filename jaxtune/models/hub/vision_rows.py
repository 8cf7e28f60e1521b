"""Rows that the key tables of vision and text towers share, and what their configs have in common."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models.hub.fields import Fields
from jaxtune.models.keys import LINEAR, Row

TOKEN = "1 1 width -> width"
TOKENS = "1 token width -> token width"
PATCH = "width channel row column -> row column channel width"
READ, READ_BIAS = "(head unit) width -> width head unit", "(head unit) -> head unit"
WRITE = "width (head unit) -> head unit width"


def dense_rows(stored: str, path: str, *, has_bias: bool = True) -> list[Row]:
    """A linear layer."""
    bias = [Row(f"{stored}.bias", f"{path}/bias")] if has_bias else []
    return [Row(f"{stored}.weight", f"{path}/kernel", LINEAR), *bias]


def norm_rows(stored: str, path: str) -> list[Row]:
    """A layer norm."""
    return [Row(f"{stored}.weight", f"{path}/scale"), Row(f"{stored}.bias", f"{path}/bias")]


def patch_rows(stored: str, *, has_bias: bool) -> list[Row]:
    """The convolution that makes tokens of patches."""
    bias = [Row(f"{stored}.bias", "patch/bias")] if has_bias else []
    return [Row(f"{stored}.weight", "patch/kernel", PATCH), *bias]


def attention_rows(
    path: str, num_heads: int, width: int, stored: Mapping[str, str], *, has_bias: bool = True
) -> list[Row]:
    """Queries, keys, values and output.

    Args:
        path: Of the attention.
        num_heads, width: Its sizes.
        stored: "out" -> stored name of the output layer; and one name each for "q", "k", "v"; or for the fused layer
            "weight" and "bias", all queries first, of these "only" the letters that it holds.
        has_bias: Whether queries, keys and values have biases.
    """
    dims, rows = {"head": num_heads}, []
    for name in (name for name in "qkv" if name in stored):
        rows.append(Row(f"{stored[name]}.weight", f"{path}/{name}/kernel", READ, dims))
        if has_bias:
            rows.append(Row(f"{stored[name]}.bias", f"{path}/{name}/bias", READ_BIAS, dims))
    if "weight" in stored:
        fused = stored.get("only", "qkv")
        sizes = (width,) * len(fused)
        rows.append(Row(stored["weight"], tuple(f"{path}/{n}/kernel" for n in fused), READ, dims, sizes))
        if has_bias:
            rows.append(Row(stored["bias"], tuple(f"{path}/{n}/bias" for n in fused), READ_BIAS, dims, sizes))
    rows.append(Row(f"{stored['out']}.weight", f"{path}/out/kernel", WRITE, dims))
    return [*rows, Row(f"{stored['out']}.bias", f"{path}/out/bias")]


def block_rows(
    config: Any, path: str, stored: str, names: Mapping[str, str], *, has_qkv_bias: bool = True
) -> list[Row]:
    """One pre-LN block.

    Args:
        config: Sizes: `num_heads`, `width`, `mlp_width`.
        path: Of the block.
        stored: What the block's tensors are called, up to the dot.
        names: Our part -> its stored name: "norm1", "norm2", the attention's as in `attention_rows`, "up" and "down" or
            "gate_up" (fused, the gate first) and "down", "scale1" and "scale2" where branches have gains.
        has_qkv_bias: Whether queries, keys and values have biases.
    """
    own = {part: name if part == "only" else f"{stored}.{name}" for part, name in names.items()}
    rows = [*norm_rows(own["norm1"], f"{path}/norm1"), *norm_rows(own["norm2"], f"{path}/norm2")]
    rows += attention_rows(f"{path}/attn", config.num_heads, config.width, own, has_bias=has_qkv_bias)
    rows += dense_rows(own["down"], f"{path}/mlp/down")
    if "gate_up" in own:
        sizes = (config.mlp_width,) * 2
        for leaf, name, pattern in (("weight", "kernel", LINEAR), ("bias", "bias", "")):
            paths = (f"{path}/mlp/gate/{name}", f"{path}/mlp/up/{name}")
            rows.append(Row(f"{own['gate_up']}.{leaf}", paths, pattern, sizes=sizes))
    else:
        rows += dense_rows(own["up"], f"{path}/mlp/up")
    rows += [Row(own[f"scale{n}"], f"{path}/layer_scale{n}/scale") for n in (1, 2) if f"scale{n}" in own]
    return rows


def under(prefix: str, rows: list[Row]) -> list[Row]:
    """The rows with every path of ours behind `prefix`."""
    return [
        Row(
            row.stored,
            f"{prefix}{row.paths}" if isinstance(row.paths, str) else tuple(f"{prefix}{path}" for path in row.paths),
            row.pattern,
            row.dims,
            row.sizes,
            row.before,
        )
        for row in rows
    ]


def read_image(fields: Fields) -> dict[str, Any]:
    """Sides of the image and of a patch, as fields of our config."""
    image, patch = side_of(fields, "image_size"), side_of(fields, "patch_size")
    return {"image_size": image, "patch_size": patch, "ignores_rest": bool(image % patch)}


def side_of(fields: Fields, name: str) -> int:
    """Side of a square, in pixels, from one number or two.

    Raises:
        ConfigError: two that differ.
    """
    value = fields[name]
    sides = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(set(sides)) != 1:
        raise fields.error(f'"{name}" is {value!r} in config.json: only squares are supported.')
    return sides[0]
