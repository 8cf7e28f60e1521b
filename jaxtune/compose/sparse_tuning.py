"""Sparse fine-tuning by lottery tickets: a full fine-tune says which entries matter, then those alone are trained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoint.sparse_delta import SparseDelta, make_sparse_delta
from jaxtune.compose.composition import check_counts
from jaxtune.compose.fitting import Recipe, check_labelled, fit, join, narrow, split
from jaxtune.compose.masks import largest, matching
from jaxtune.errors import ConfigError
from jaxtune.sample import Sample, example_losses, weighted_mean
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.tree import check_finite
from jaxtune.types import Params


@dataclass(frozen=True)
class SparseTune:
    """A sparse fine-tune.

    Attributes:
        params: The network.
        delta: What was changed; `checkpoint.sparse_delta` adds, stores and reads it.
        info: Losses of every phase, the number of entries chosen and kept, the smallest change that was chosen.
    """

    params: Params
    delta: SparseDelta
    info: dict[str, Any]


@own_states()
def tune_sparse(
    base: Params,
    sample: Sample,
    *,
    density: float = 0.01,
    num_rounds: int = 1,
    full: Recipe | None = None,
    sparse: Recipe | None = None,
    l1: float = 0.0,
    fixed: str | None = None,
    whole: str | None = None,
    seed: int = 0,
    series: Sequence[StateSeries] | None = None,
) -> SparseTune:
    """Trains all weights, keeps the places of the largest changes, goes back to the base and trains these places alone.

    What is not chosen has no optimiser state: neither momentum nor weight decay can move it.

    Args:
        base: θ_0.
        sample: Labelled examples.
        density: Share of the entries that may change, K = ⌊density n⌋; n counts the leaves that may be masked.
        num_rounds: Rounds of K / num_rounds places each, every one from where the last sparse phase ended.
        full, sparse: How the two phases train, with an optimiser and a schedule of their own each; None: `Recipe()`.
        l1: Factor of the mean |θ - θ_0| in the loss of full phases.
        fixed: Leaves (a regular expression of whole paths) that stay as they are in sparse phases.
        whole: Leaves that are trained and stored whole, such as a new head; not counted in n.
        seed: Of the order of the examples.
        series: Where states are kept: of each round the full phase and the sparse one, so twice `num_rounds`.

    Raises:
        ConfigError: a number out of range, no leaf to choose from, or fewer entries that moved at all than are to be
            chosen: then places would be chosen by chance.
        DataError: no labels.

    Reference:
        Ansell et al. 2022, arXiv:2110.07560. Exactly K places; of equal changes the first.
    """
    check_labelled(sample, "sparse fine-tuning")
    check_finite("base", base)
    check_counts(num_rounds=num_rounds)
    if not 0 < density <= 1 or l1 < 0:
        raise ConfigError(f"density {density} must lie in (0, 1], l1 {l1} must not be negative.")
    if series is not None and len(series) != 2 * num_rounds:
        raise ConfigError(f"{num_rounds} rounds have {2 * num_rounds} phases, got series for {len(series)}.")
    recipes = full or Recipe(), sparse or Recipe()
    moving, still = split(base, sample)
    moving = {path: np.asarray(leaf) for path, leaf in moving.items()}
    kept_whole = matching(moving, whole, "whole")
    apart = {*kept_whole, *matching(moving, fixed, "fixed")}
    scope = [path for path in moving if path not in apart]
    size = sum(moving[path].size for path in scope)
    count = math.floor(density * size + 1e-9)
    if count < num_rounds:
        raise ConfigError(
            f"density {density} of {size} entries is {count}, fewer than one for each of {num_rounds} rounds."
        )
    places: dict[str, np.ndarray] = {path: np.zeros(0, np.int64) for path in scope}
    current, info = (
        dict(moving),
        {"num_chosen": count, "rounds": [], "full": asdict(recipes[0]), "sparse": asdict(recipes[1])},
    )
    for number in range(num_rounds):
        states = (None, None) if series is None else series[2 * number : 2 * number + 2]
        found = fit(
            near_base, current, {"still": still, "base": moving, "l1": np.float32(l1)}, sample,
            recipe=recipes[0], seed=seed, series=states[0],
        )  # fmt: skip
        wanted = count * (number + 1) // num_rounds - count * number // num_rounds
        smallest = _choose(places, {path: np.asarray(found.numbers[path]) for path in scope}, moving, wanted)
        start = {f"{path}/places": _values(current[path], places[path]) for path in scope if len(places[path])}
        start |= {path: current[path] for path in kept_whole}
        phase = {
            "leaves": {path: current[path] for path in current if path not in kept_whole},
            "still": still,
            "places": {path: places[path].astype(np.int32) for path in scope if len(places[path])},
        }
        tuned = fit(at_places, start, phase, sample, recipe=recipes[1], seed=seed, series=states[1])
        current = {path: np.asarray(leaf) for path, leaf in place(tuned.numbers, phase).items()}
        info["rounds"].append({"full": found.losses, "sparse": tuned.losses, "smallest_chosen": smallest})
    params = narrow({**current, **still}, base)
    delta = make_sparse_delta(base, narrow({**current, **still}, join(moving, still)), whole=kept_whole)
    info["num_entries"] = delta.num_entries
    return SparseTune(params, delta, info)


def near_base(forward: Any, numbers: Any, fixed: Any, batch: Mapping[str, Any], key: jax.Array) -> jax.Array:
    """Cross-entropy, and the mean distance from the base times `l1`."""
    del key
    loss = weighted_mean(example_losses(forward(join(numbers, fixed["still"]), batch), batch), batch)
    away = sum(jnp.sum(jnp.abs(leaf - fixed["base"][path])) for path, leaf in numbers.items())
    return loss + fixed["l1"] * away / sum(leaf.size for leaf in numbers.values())


def at_places(forward: Any, numbers: Any, fixed: Any, batch: Mapping[str, Any], key: jax.Array) -> jax.Array:
    """Cross-entropy of the network with these values at these places."""
    del key
    params = join(place(numbers, fixed), fixed["still"])
    return weighted_mean(example_losses(forward(params, batch), batch), batch)


def place(numbers: Mapping[str, Any], fixed: Any) -> dict[str, Any]:
    """{path: leaf} of a whole network out of the values at the places that are trained."""
    whole = {path: leaf for path, leaf in numbers.items() if not path.endswith("/places")}
    leaves = {path: jnp.asarray(leaf) for path, leaf in fixed["leaves"].items()}
    for path, places in fixed["places"].items():
        values = numbers[f"{path}/places"].reshape(-1)
        leaves[path] = leaves[path].reshape(-1).at[places].set(values, unique_indices=True).reshape(leaves[path].shape)
    return {**leaves, **whole}


def _values(leaf, places):
    """Values at places; of a matrix as a column, so that weight decay knows it for one."""
    values = leaf.reshape(-1)[places]
    return values[:, None] if leaf.ndim >= 2 else values


def _choose(places, tuned, base, count):
    """Adds the `count` largest changes among entries not chosen yet; returns the smallest of them."""
    changes = {path: np.abs(leaf - base[path]) for path, leaf in tuned.items()}
    for path, chosen in places.items():
        changes[path].reshape(-1)[chosen] = -1
    num_moved = sum(int(np.count_nonzero(leaf > 0)) for leaf in changes.values())
    if num_moved < count:
        raise ConfigError(
            f"{num_moved} entries moved in the full fine-tune and {count} are to be chosen: the rest would be chosen "
            "by chance among those that did not. Train longer, give a lower density, or leave out leaves with fixed=."
        )
    picked = largest(changes, count)
    for path, mask in picked.items():
        places[path] = np.sort(np.concatenate([places[path], np.flatnonzero(mask)]))
    return float(min(changes[path][mask].min() for path, mask in picked.items() if mask.any()))
