"""Two networks and their symmetry as one problem: what is measured once and holds for the whole search."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxtune.align.assignment import solve_assignment, solve_assignment_from
from jaxtune.align.circuits import circuit_norms, own_products
from jaxtune.align.heads import spectral_scores
from jaxtune.align.inside import INSIDE
from jaxtune.align.lengths import balance_units
from jaxtune.align.products import leaf_product
from jaxtune.align.shortlist import Standing
from jaxtune.lazy import ReadOnUse
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.element import Element
from jaxtune.symmetry.spec import Spec

Weights = Mapping[str, float]
# Kinds that change the norm of what they move.
STRETCHING_KINDS = ("general_linear", "rotary", "scaled_permutation")


@dataclass(frozen=True)
class Problem:
    """Two networks and their symmetry, ready for matching.

    Attributes:
        spec: Symmetry of both.
        target, source: Flat trees, left where they are: a copy of both on the device would double the memory.
        weights: Factor of each matched leaf that is not zero.
        mass: `weight * |target| * |source|` of each matched leaf: the most it can contribute.
        squares: `|source|^2` of each matched leaf whose norm an element can change.
        products: `<target, source>` of each matched leaf, where nothing has moved.
        blocks: Block -> its leaves.
        owners: Leaf -> blocks that move it.
        head_cost: How the order of heads is proposed: "exact", "circuit" or "spectral".
    """

    spec: Spec
    target: Mapping[str, Any]
    source: Mapping[str, Any]
    weights: Weights
    mass: Mapping[str, float]
    squares: Mapping[str, float]
    products: Mapping[str, float]
    blocks: Mapping[str, tuple[str, ...]]
    owners: Mapping[str, frozenset[str]]
    head_cost: str
    _spectral: dict[str, np.ndarray] = field(default_factory=dict)
    _sides: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _norms: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    _standing: dict[str, Standing | None] = field(default_factory=dict)
    _scales: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def objective_of_identity(self) -> float:
        """`objective` where nothing has moved."""
        return sum(weight * self.products[path] for path, weight in self.weights.items())

    def objective(self, element) -> float:
        """`sum of weight * (<target, g(source)> - (|g(source)|^2 - |source|^2) / 2)`; no unit."""
        total = 0.0
        for path, weight in self.weights.items():
            product, square = leaf_product(self.spec, element, path, self.target[path], self.source[path])
            total += weight * (product - 0.5 * (square - self.squares.get(path, square)))
        return total

    def best_order(self, name: str, scores: np.ndarray) -> np.ndarray:
        """The order of a group's units that scores best; begins where the group's last one ended."""
        order, self._standing[name] = solve_assignment_from(scores, self._standing.get(name))
        return order

    def spectral_order(self, head: str) -> np.ndarray:
        """Order of the heads by their spectra; taken once, since no order changes a spectrum."""
        if head not in self._spectral:
            self._spectral[head] = solve_assignment(spectral_scores(self.spec, head, self.target, self.source))
        return self._spectral[head]

    def circuit_norms(self, head: str) -> dict[str, np.ndarray]:
        """`circuits.circuit_norms`, taken once: no element changes them."""
        if head not in self._norms:
            self._norms[head] = circuit_norms(self.spec, head, self.target, self.source)
        return self._norms[head]

    def balanced_scales(self) -> list[dict[str, np.ndarray]]:
        """Scales after which each unit of the target and of the source is as long on both sides; taken once."""
        if not self._scales:
            # Set as a whole: two blocks may ask at once.
            self._scales[:] = [balance_units(self.spec, tree, self.weights) for tree in (self.target, self.source)]
        return self._scales

    def sides(self, head: str, child: str, weights: Weights) -> tuple[Any, Any]:
        """What `align.inside` wants to know of source and target apart; taken once for the full set of leaves."""
        make = INSIDE[self.spec.groups[child].kind].sides
        if make is None:
            return None, None
        paths = [path for path, _ in self.spec.leaves_of(child) if path in self.weights]
        is_whole = all(weights.get(path) == self.weights[path] for path in paths)
        if is_whole and child in self._sides:
            return self._sides[child]
        pair = tuple(make(*own_products(self.spec, head, child, tree, weights)) for tree in (self.source, self.target))
        if is_whole:
            self._sides[child] = pair
        return pair

    def agreements(self, element: Element) -> dict[str, float]:
        """Cosine of target and moved source, leaf by leaf; 0 where the moved source is zero."""
        cosines = {}
        for path in self.weights:
            product, square = leaf_product(self.spec, element, path, self.target[path], self.source[path])
            norm = float(np.linalg.norm(np.asarray(self.target[path], np.float32))) * square**0.5
            cosines[path] = product / norm if norm else 0.0
        return cosines

    def reweigh(self, factors: Mapping[str, float]) -> "Problem":
        """The same problem with every weight multiplied; leaves of factor 0 no longer count."""
        kept = {path: factors[path] for path in self.weights if factors[path] > 0}
        return replace(
            self,
            weights={path: self.weights[path] * kept[path] for path in kept},
            mass={path: self.mass[path] * kept[path] for path in kept},
            _sides={},
            _scales=[],
        )


def make_problem(
    spec: Spec, target: Mapping[str, Any], source: Mapping[str, Any], *, head_cost: str, weighting: str
) -> Problem:
    """Works out what each leaf of two flat trees can contribute, and who depends on whom.

    Args:
        weighting: "plain": every leaf counts as it is. "unit": every leaf counts by its cosine, so that no
            large leaf drowns the others.
    """
    target, source = ReadOnUse(target), ReadOnUse(source)
    matched = [path for path in spec.axes if path not in spec.unmatched]
    norms, products = {}, {}
    for path in matched:
        ours, theirs = (np.asarray(tree[path], np.float32).ravel() for tree in (target, source))
        norms[path] = float(np.linalg.norm(ours)) * float(np.linalg.norm(theirs))
        products[path] = float(np.vdot(ours, theirs))
    # A leaf of zeros (a fresh bias) says nothing, whatever it is divided by.
    weights = {path: 1.0 if weighting == "plain" else 1.0 / norms[path] for path in matched if norms[path] > 0}
    identity = elements.identity(spec)
    stretched = {
        path
        for path in weights
        if any(axis and spec.groups[axis.group].kind in STRETCHING_KINDS for axis in spec.axes[path])
    }
    return Problem(
        spec=spec,
        target=target,
        source=source,
        weights=weights,
        mass={path: weights[path] * norms[path] for path in weights},
        squares={path: leaf_product(spec, identity, path, source[path], source[path])[1] for path in stretched},
        products=products,
        blocks={
            name: tuple(dict.fromkeys(path for path, _ in spec.leaves_of(name)))  # children share them
            for name, group in spec.groups.items()
            if group.parent is None
        },
        owners={
            path: frozenset(spec.groups[axis.group].parent or axis.group for axis in axes if axis)
            for path, axes in spec.axes.items()
        },
        head_cost=head_cost,
    )
