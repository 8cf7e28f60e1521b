"""A rotation for every side of every matrix, from what both bases do on the same inputs; widths may differ."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.moments import Meeting, Pair, gather_pairs
from jaxtune.sample import Sample
from jaxtune.symmetry.spec import Spec
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.tree import check_finite, check_same, flatten, is_float, task_vector, unflatten
from jaxtune.types import Leaf, Params

# Directions in which the two networks meet less than this, relative to the strongest, are rounding of float32 sums.
RANK_TOLERANCE = 1e-6

# Of one side of a matrix, [n_source, n_target].
Maps = Mapping[str, tuple[np.ndarray, np.ndarray]]


def prepare_theseus(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    sample: Sample,
    centred: bool = False,
    whitening: float = 0.0,
    ridge: float = 1e-3,
    chunk_size: int = 32,
) -> Prepared:
    """`τ_B = T_inᵀ τ_A T_out` for every matrix (rows are examples, y = x W): T the rotations nearest to what was seen.

    `T = polar(G_A^-p (X_Aᵀ X_B) G_B^-p)`, of what the matrix reads and of what it makes. Directions that the sample
    does not show are left out, so that few examples carry little and not noise. A bias moves with what its matrix
    makes. Axes that mean the same in both networks (pixels, tokens of a vocabulary, classes) do not turn. What is no
    matrix at work (token and position tables that are looked up, norms) gets zero; `info["left_out"]` names it.

    Args:
        key: Not used; nothing is random.
        symmetry: Spec of the target: says which axes are fixed.
        source, finetuned, target: Old base, its fine-tune, new base. Widths may differ where `sample` knows both
            (`sampling.for_sizes`); the matrices must have the same paths.
        sample: Inputs; labels are not looked at.
        centred: Whether means over the rows are taken off.
        whitening: p, from 0 (none) to 0.5 (canonical correlation).
        ridge: Added to the Grams before whitening, relative to their mean eigenvalue.
        chunk_size: Examples at a time.

    Raises:
        ConfigError: an option out of its range; the family cannot be recorded; fixed axes of different sizes.
        TreeMismatchError, NonFiniteError, DataError: unusable trees or examples.

    Reference:
        Theseus 2026, arXiv:2602.12952. Differs: biases move, fixed axes stay fixed, and unseen directions are left out
        (the polar factor sends them anywhere).
    """
    del key
    check_options(whitening, ridge)

    def turn(meeting):
        return meeting.inputs, meeting.outputs

    return prepare_by_maps(
        symmetry(),
        (source, finetuned, target),
        gather_pairs(source, target, sample, chunk_size=chunk_size),
        lambda pair: fit_rotation(pair, centred=centred, whitening=whitening, ridge=ridge),
        turn,
        len(sample),
    )


def check_options(whitening: float, ridge: float) -> None:
    """Raises `ConfigError` where one is out of its range."""
    if not 0 <= whitening <= 0.5:
        raise ConfigError(f"whitening={whitening!r}: expected a power from 0 to 0.5.")
    if not 0 <= ridge < np.inf:
        raise ConfigError(f"ridge={ridge!r}: expected a finite number of at least 0.")


def fit_rotation(pair: Pair, *, centred: bool, whitening: float, ridge: float) -> np.ndarray:
    """The partial isometry nearest to the cross-moments: float64[n_source, n_target]."""
    pair = pair.centred() if centred else pair
    cross = pair.cross
    if whitening:
        cross = _power(pair.first, -whitening, ridge) @ cross @ _power(pair.second, -whitening, ridge)
    left, values, right = np.linalg.svd(cross, full_matrices=False)
    seen = values > RANK_TOLERANCE * max(values[0], np.finfo(np.float64).tiny)
    return left[:, seen] @ right[seen]


def prepare_by_maps(
    spec: Spec,
    networks: tuple[Params, Params, Params],
    meetings: Mapping[str, Meeting],
    fit: Callable[[Pair], np.ndarray],
    sides: Callable[[Meeting], tuple[Pair, Pair]],
    num_examples: int,
) -> Prepared:
    """Fits one map for every side of every matrix and moves the task vector through them.

    Args:
        spec: Of the target.
        networks: Source, fine-tune, target.
        meetings: Of source and target.
        fit: Moments of a side -> map.
        sides: Meeting -> moments that give the maps of inputs and of outputs.
        num_examples: For the report.
    """
    source, finetuned, target = networks
    check_same({"source": source, "finetuned": finetuned})
    _check_paths(source, target)
    for name, params in zip(("source", "finetuned", "target"), networks, strict=True):
        check_finite(name, params)
    maps = {}
    for path, meeting in meetings.items():
        inputs, outputs = sides(meeting)
        ours = [axis for axis in range(np.ndim(flatten(target)[path])) if axis not in meeting.in_axes]
        maps[path] = tuple(
            _fixed(path, pair) if _is_fixed(spec, path, axes) else fit(pair)
            for pair, axes in ((inputs, meeting.in_axes), (outputs, ours))
        )
    in_axes = {path: meeting.in_axes for path, meeting in meetings.items()}
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(target).items()}
    kinds = {path: _kind_of(leaf) for path, leaf in flatten(target).items()}

    def move(finetuned):
        change = flatten(task_vector(source, finetuned))
        moved = {path: _move(path, change[path], maps, in_axes, shape) for path, shape in shapes.items()}
        return unflatten(
            {
                path: np.zeros(shape, kinds[path]) if moved[path] is None else moved[path].astype(kinds[path])
                for path, shape in shapes.items()
            }
        )

    left_out = [path for path in shapes if _owner_of(path, maps) is None]
    return Prepared(
        task_vector=move(finetuned),
        spec=spec,
        info={
            "num_examples": num_examples,
            "num_matrices": len(maps),
            "left_out": left_out,
        },
        move=move,
    )


def _check_paths(source, target):
    apart = sorted(flatten(source).keys() ^ flatten(target).keys())
    if apart:
        raise TreeMismatchError(
            f"source and target may differ in widths, and not in depth or parts; {len(apart)} leaves are only in one "
            f"of them: {', '.join(apart[:5])}{', ...' if len(apart) > 5 else ''}."
        )


def _move(path: str, change: Leaf, maps: Maps, in_axes: Mapping[str, tuple[int, ...]], shape) -> Any:
    """The moved change of one leaf in the shape of the target's; None where nothing says how it moves."""
    owner = _owner_of(path, maps)
    if owner is None:
        return None
    change = np.asarray(change, np.float64)
    to_inputs, to_outputs = maps[owner]
    if owner != path:  # a bias
        return (change.reshape(-1) @ to_outputs).reshape(shape)
    axes = in_axes[path]
    order = (*axes, *(axis for axis in range(len(shape)) if axis not in axes))
    matrix = change.transpose(order).reshape(len(to_inputs), len(to_outputs))
    moved = (to_inputs.T @ matrix @ to_outputs).reshape([shape[axis] for axis in order])
    return moved.transpose(np.argsort(order))


def _kind_of(leaf):
    """The dtype of what is added to a leaf: float32, or what is wider; of integers their own."""
    if not is_float(leaf):
        return leaf.dtype
    return np.float64 if leaf.dtype == np.float64 else np.float32


def _owner_of(path, maps):
    """The matrix whose maps move a leaf: itself, or that of a bias."""
    if path in maps:
        return path
    parent, _, name = path.rpartition("/")
    kernel = f"{parent}/kernel"
    return kernel if name == "bias" and kernel in maps else None


def _is_fixed(spec, path, axes):
    return all(spec.axes[path][axis] is None for axis in axes)


def _fixed(path, pair):
    if pair.cross.shape[0] != pair.cross.shape[1]:
        raise ConfigError(
            f"{path}: an axis that means the same in both networks has {pair.cross.shape[0]} entries in the source and "
            f"{pair.cross.shape[1]} in the target; patches, vocabularies and classes must agree."
        )
    return np.eye(len(pair.cross))


def _power(gram, power, ridge):
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0) + ridge * max(np.mean(values), np.finfo(np.float64).tiny)
    return (vectors * values**power) @ vectors.T
