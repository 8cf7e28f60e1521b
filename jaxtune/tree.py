"""Trees of arrays, addressed by path; the arithmetic of task vectors on them.

Every function takes numpy or JAX leaves and answers in kind, so the same line runs on a host file,
inside `jit` and on a sharded array.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtune.errors import NonFiniteError, TreeMismatchError
from jaxtune.lazy import LazyLeaf, is_lazy, read
from jaxtune.types import Leaf, Params

MAX_LINES = 12  # of one error message: enough to see the pattern, short enough to read


def flatten(params: Params) -> dict[str, Leaf]:
    """Nested dict -> {path: leaf}, in natural order of the paths ("block_2" before "block_10").

    Raises:
        TreeMismatchError: no nested dict, a leaf that is no array, or a key that is not a non-empty string
            without "/".
    """
    flat: dict[str, Leaf] = {}
    if not isinstance(params, Mapping):
        raise TreeMismatchError(
            f"expected a nested dict of arrays, got {type(params).__name__}; of a checkpoint, take its .params."
        )

    def walk(node, prefix):
        for key, value in node.items():
            if not isinstance(key, str) or not key or "/" in key:
                raise TreeMismatchError(
                    f"key {key!r} under {prefix or 'the root'!r}: keys are non-empty strings without '/'."
                )
            path = f"{prefix}/{key}" if prefix else key
            if isinstance(value, Mapping):
                walk(value, path)
            elif hasattr(value, "shape") and hasattr(value, "dtype"):
                flat[path] = value
            else:
                raise TreeMismatchError(f"{path}: expected an array, got {type(value).__name__}.")

    walk(params, "")
    return {path: flat[path] for path in sorted(flat, key=_natural)}


def unflatten(flat: Mapping[str, Leaf]) -> dict[str, Any]:
    """{path: leaf} -> nested dict; the inverse of `flatten`.

    Raises:
        TreeMismatchError: one path runs through another's leaf ("a" and "a/b").
    """
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise TreeMismatchError(f"{path}: {parent} is a leaf and a folder at once.")
        if name in node:
            raise TreeMismatchError(f"{path}: a leaf and a folder at once, or twice.")
        node[name] = leaf
    return root


def map_leaves(
    function: Callable[..., Leaf],
    params: Params,
    *others: Params,
    dtype: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Applies `function(path, leaf, *other_leaves)` to every leaf; trees must have the same paths.

    Where one of the leaves is lazy (`jaxtune.lazy`) so is the result: `function` runs when it is read, on arrays. It
    then has the shape of the first leaf, and the dtype that `dtype(path, leaf, *other_leaves)` says (None: that of the
    first leaf).
    """
    flats = [flatten(tree) for tree in (params, *others)]
    for other in flats[1:]:
        if other.keys() != flats[0].keys():
            odd = sorted(other.keys() ^ flats[0].keys())
            raise TreeMismatchError(f"trees differ in {len(odd)} paths: {', '.join(odd[:MAX_LINES])}.")

    def mapped(path):
        leaves = [flat[path] for flat in flats]
        if not any(map(is_lazy, leaves)):
            return function(path, *leaves)
        of = leaves[0].dtype if dtype is None else dtype(path, *leaves)
        return LazyLeaf(leaves[0].shape, of, lambda: np.asarray(function(path, *map(read, leaves))))

    return unflatten({path: mapped(path) for path in flats[0]})


def select(params: Params, *, include: str = ".*", exclude: str | None = None) -> dict[str, Any]:
    """The leaves whose whole path matches `include` and not `exclude` (regular expressions)."""
    wanted, unwanted = re.compile(include), re.compile(exclude) if exclude else None
    return unflatten(
        {
            path: leaf
            for path, leaf in flatten(params).items()
            if wanted.fullmatch(path) and not (unwanted and unwanted.fullmatch(path))
        }
    )


def match_paths(pattern: str, params: Params) -> list[str]:
    """Paths that match a shell-style pattern, for instance "block_*/mlp/*"."""
    return [path for path in flatten(params) if fnmatch.fnmatchcase(path, pattern)]


def describe_leaf(leaf: Leaf) -> str:
    """`float32[3, 7]`, as error messages and listings show it."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def check_same(trees: Mapping[str, Params], *, dtypes: bool = False) -> None:
    """Checks that trees have the same paths and shapes, and on request the same dtypes.

    Args:
        trees: Name used in the message -> tree. The first one is the reference.
        dtypes: Whether dtypes must agree too; whether a leaf is a float must always agree.

    Raises:
        TreeMismatchError: lists every difference by path, both sides, and what to do.
    """
    (first, reference), *others = trees.items()
    reference = flatten(reference)
    for name, tree in others:
        tree = flatten(tree)
        lines = []
        for path in sorted(reference.keys() | tree.keys(), key=_natural):
            if path not in tree:
                lines.append(f"  {path}: only in {first} ({describe_leaf(reference[path])})")
            elif path not in reference:
                lines.append(f"  {path}: only in {name} ({describe_leaf(tree[path])})")
            else:
                ours, theirs = reference[path], tree[path]
                same = ours.shape == theirs.shape and is_float(ours) == is_float(theirs)
                if not same or (dtypes and ours.dtype != theirs.dtype):
                    lines.append(f"  {path}: {first} {describe_leaf(ours)}, {name} {describe_leaf(theirs)}")
        if lines:
            raise TreeMismatchError(
                f"{first} and {name} differ in {len(lines)} leaves:\n"
                + _shorten(lines)
                + "\nBoth must be the same architecture with the same sizes. "
                'To leave leaves out (a new head), name them: tree.select(params, exclude="head/.*").'
            )


def check_finite(name: str, params: Params) -> None:
    """Raises `NonFiniteError` that names each leaf of `params` holding NaN or Inf, with counts."""
    lines = []
    for path, leaf in flatten(params).items():
        if is_float(leaf):
            values = np.asarray(leaf)
            if values.dtype.itemsize < 4:
                values = values.astype(np.float32)
            bad = values.size - int(np.count_nonzero(np.isfinite(values)))
            if bad:
                lines.append(f"  {path}: {bad} of {values.size} values of {describe_leaf(leaf)}")
    if lines:
        raise NonFiniteError(
            f"{name} holds NaN or Inf in {len(lines)} leaves:\n"
            + _shorten(lines)
            + "\nThe training run that wrote it diverged, or the file is damaged; use an earlier checkpoint."
        )


def is_float(leaf: Leaf) -> bool:
    """Whether a leaf takes part in arithmetic; integer and boolean leaves never do."""
    # bfloat16 and the float8 types are not numpy's own floats; ml_dtypes gives them kind "V" or "f".
    dtype = np.dtype(leaf.dtype)
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def task_vector(base: Params, finetuned: Params) -> dict[str, Any]:
    """What fine-tuning added: `finetuned - base`.

    Shapes:
        every leaf: as in `base`; float32, or float64 where either input is. Integer and boolean
        leaves come back as zeros of their own dtype: they are never differenced.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape.
    """
    check_same({"base": base, "finetuned": finetuned})

    def subtract(_, old, new):
        xp = _namespace(old, new)
        if not is_float(old):
            return xp.zeros(old.shape, old.dtype)
        wide = _wide_dtype(old, new)
        if xp is np:  # cast as it goes: no copy of either in the wide dtype
            return np.asarray(np.subtract(new, old, dtype=wide, casting="unsafe"))
        return xp.asarray(new).astype(wide) - xp.asarray(old).astype(wide)

    return map_leaves(subtract, base, finetuned, dtype=lambda _, old, new: _difference_dtype(old, new))


def apply_task_vector(base: Params, vector: Params, scale: float | Leaf = 1.0) -> dict[str, Any]:
    """`base + scale * vector`, computed in float32 or wider and rounded once to the dtype of `base`.

    Args:
        base: Where the vector is added.
        vector: As `task_vector` makes it; leaves that are not floats are ignored.
        scale: One number; traceable, so a sweep of scales is one `vmap`.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape.
    """
    check_same({"base": base, "task_vector": vector})

    def add(_, leaf, delta):
        if not is_float(leaf):
            return leaf
        xp = _namespace(leaf, delta, scale)
        wide = _wide_dtype(leaf, delta)
        factor = xp.asarray(scale).astype(wide)
        if xp is np:
            moved = np.asarray(np.multiply(delta, factor, dtype=wide, casting="unsafe"))
            return np.add(moved, leaf, out=moved, dtype=wide, casting="unsafe").astype(leaf.dtype)
        moved = xp.asarray(leaf).astype(wide) + factor * xp.asarray(delta).astype(wide)
        return moved.astype(leaf.dtype)

    return map_leaves(add, base, vector)


def count_parameters(params: Params) -> int:
    """Number of scalars in the whole tree."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in flatten(params).values())


def _difference_dtype(old, new):
    return _wide_dtype(old, new) if is_float(old) else old.dtype


def _wide_dtype(*leaves):
    return np.float64 if any(np.dtype(leaf.dtype) == np.float64 for leaf in leaves) else np.float32


def _namespace(*leaves):
    """`jax.numpy` as soon as one leaf is JAX's (an array or a tracer), else `numpy`."""
    for leaf in leaves:
        if not isinstance(leaf, (np.ndarray, np.generic, int, float)):
            import jax.numpy as jnp

            return jnp
    return np


def _natural(path):
    return [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", path)]


def _shorten(lines):
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"  ... and {len(lines) - MAX_LINES} more"]
    return "\n".join(lines)
