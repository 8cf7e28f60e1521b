"""Method `full`, its element corrected by what the two bases do on a few inputs."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from jaxtune.align.assignment import solve_assignment
from jaxtune.align.bases import centred_polar_factor, polar_factor
from jaxtune.align.weights import match_weights
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.moments import gather_pairs
from jaxtune.sample import Sample
from jaxtune.symmetry import canonical
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.element import Element
from jaxtune.symmetry.spec import Spec
from jaxtune.transport.folded_moments import Table, lay_out_moments
from jaxtune.transport.full import carry_by_element
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.transport.site_maps import fit_site_maps, turn
from jaxtune.transport.trust import check_trust
from jaxtune.tree import check_finite, check_same
from jaxtune.types import Params

TIES = ("network", "block", "site")
ORDERS = {"permutation", "signed_permutation"}
POLAR = {"orthogonal": polar_factor, "centred_orthogonal": centred_polar_factor, "general_linear": polar_factor}


def prepare_tied(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    sample: Sample,
    tie: str = "block",
    prior: float = 32.0,
    head_cost: str = "circuit",
    max_sweeps: int = 100,
    tolerance: float = 1e-3,
    trust: float = 0.0,
    chunk_size: int = 32,
) -> Prepared:
    """The element of `full`, and a correction from activations that counts more the more there are.

    `full` finds an element from the weights and applies it. What is then left between the two networks' activations on
    the same inputs turns the moved change: `polar(n C + prior I)`, C the correlation of the moved source's activations
    and the target's, n the number of examples. No examples give `full`, and many the rotations of `theseus`. Sides that
    the network ties share their evidence, see `tie`. Everything moves that `full` moves, tables and norms too.

    Args:
        key: As `prepare_full`.
        symmetry: Spec of the bases; must declare a form (the transformers do).
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.
        sample: Inputs, none at all among the possible numbers; labels are not looked at.
        tie: What shares one rotation. "block": within one attention or one MLP all sides that read or write the stream,
            both sides of the hidden units, queries and keys, values and what reads them. "site": nothing. "network":
            the stream as a whole, each head by itself (one map for queries and keys, one for values and what reads
            them), hidden units by an assignment: the result is one element of the symmetry, heads in the order that
            the weights give.
        prior: How many examples the weights' own answer is worth.
        head_cost, max_sweeps, tolerance, trust: As `prepare_full`.
        chunk_size: Examples at a time.

    Returns:
        As `prepare_full`; `info["agreement"]` has the correlation of the activations under the weights' element and
        under the corrected one, by kind of units.

    Raises:
        ConfigError: as `prepare_full`; a prior that is not above 0; the family cannot be recorded.
        SpecError, TreeMismatchError, NonFiniteError: as `prepare_full`.

    Reference:
        This project; rotations from activations as in arXiv:2602.12952.
    """
    check_trust(trust)
    if tie not in TIES:
        raise unknown_name("tie", tie, TIES)
    if not (math.isfinite(prior) and prior > 0):
        raise ConfigError(f"prior={prior!r}: expected a finite number of examples above 0.")
    spec = symmetry()
    check_same({"source": source, "finetuned": finetuned, "target": target})
    for name, params in (("source", source), ("finetuned", finetuned), ("target", target)):
        check_finite(name, params)
    folded_spec = canonical.canonical_spec(spec)
    folded = {name: canonical.fold(spec, params) for name, params in (("source", source), ("target", target))}
    options = {"head_cost": head_cost, "max_sweeps": max_sweeps, "tolerance": tolerance}
    result = match_weights(key, folded_spec, folded["target"], folded["source"], weighting="plain", **options)
    element, agreement, turning = result.element, {}, {}
    if len(sample):
        meetings = gather_pairs(source, target, sample, chunk_size=chunk_size)
        tables = lay_out_moments(spec.form, folded_spec, (source, target), meetings)
        if tie == "network":
            element, agreement = correct_element(folded_spec, element, tables, len(sample), prior)
        else:
            moved = [move_table(folded_spec, element, table, table.cross) for table in tables]
            counts = {"num_examples": len(sample), "prior": prior}
            maps = fit_site_maps(folded_spec, tables, moved, tie=tie, **counts)
            turning = {"turn": lambda change: turn(folded_spec, change, tables, *maps)}
    info = {
        "is_converged": result.is_converged,
        "num_sweeps": result.num_sweeps,
        "start": result.start,
        "objectives": list(result.objectives),
        "num_examples": len(sample),
        "tie": tie,
        "agreement": agreement,
    }
    return carry_by_element(spec, element, folded, finetuned, target, trust=trust, info=info, **turning)


def correct_element(
    spec: Spec, element: Element, tables: list[Table], num_examples: int, prior: float
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The element followed by what the activations say is left.

    Args:
        spec: Of the folded weights.
        element: From the weights.
        tables: Moments of the networks, before the element.
        num_examples: How much they count.
        prior: How much the element counts.

    Returns:
        (element, {role: {"before": correlation, "after": correlation}}).
    """
    moved = [_move(spec, element, table) for table in tables]  # once: every group looks at the same
    correction, sums = elements.identity(spec), {}
    for name, group in spec.groups.items():
        scores = [
            found for table, cross in zip(tables, moved, strict=True) for found in _scores(spec, name, table, cross)
        ]
        if not scores:
            continue
        mean = np.mean(scores, axis=0)
        evidence = num_examples * mean + prior * np.eye(group.size)
        if group.kind in POLAR:
            value = POLAR[group.kind](evidence)
            gain = np.sum(mean * value)
        else:
            order = solve_assignment((np.abs(evidence) if group.kind == "signed_permutation" else evidence).T)
            picked = evidence.T[np.arange(group.size), order]
            value = order if group.kind == "permutation" else np.stack([order, np.where(picked < 0, -1.0, 1.0)])
            gain = np.sum(np.abs(mean.T[np.arange(group.size), order]))
        correction[name] = value
        before = np.sum(np.trace(mean, axis1=-2, axis2=-1))
        rows = sums.setdefault(group.role, [])
        rows.append((before / (mean.size / group.size), gain / (mean.size / group.size)))
    agreement = {
        role: dict(zip(("before", "after"), map(float, np.mean(rows, axis=0)), strict=True))
        for role, rows in sums.items()
    }
    return elements.compose(spec, correction, element), agreement


def _move(spec, element, table):
    """The table with the source's units where the element puts them; of units with an order alone, correlations."""
    kinds = {spec.groups[axis.group].kind for axis in table.axes if axis}
    return move_table(spec, element, table, table.correlations if kinds <= ORDERS else table.cross)


def move_table(spec: Spec, element: Element, table: Table, values: np.ndarray) -> np.ndarray:
    """Values laid out as a table's, the source's units where the element puts them."""
    own = replace(spec, axes={"table": (*table.axes, None)})
    return elements.apply_to_leaf(own, element, "table", values)


def _scores(spec, name, table, cross):
    """What a moved table says about a group, a correlation: float64[n, n] or float64[parent, n, n]; at most one."""
    group, owners = spec.groups[name], [axis.group if axis else None for axis in table.axes]
    if name not in owners:
        return
    ours, theirs = table.energies
    if group.kind in POLAR and owners == [name]:
        yield cross * group.size / math.sqrt(ours * theirs)
    elif group.kind in POLAR and group.parent is not None and (owners[0], owners[-1]) == (group.parent, name):
        # [head, query, unit, head, query, unit]; an invertible map changed the source's energy into the target's.
        heads, size = cross.shape[0], group.size
        cross = cross.reshape(heads, -1, size, heads, cross.shape[-1] // (heads * size), size)
        if cross.shape[1] == cross.shape[4]:
            yield np.einsum("hquhqv->huv", cross) * (heads * size) / theirs
    elif group.kind in ORDERS and group.role == "hidden" and owners == [name]:
        is_blind = group.kind == "signed_permutation" and table.axes[0].order_only  # it has seen no sign
        if not is_blind:
            yield cross
