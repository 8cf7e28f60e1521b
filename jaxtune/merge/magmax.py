"""The task vectors' entries of largest magnitude."""

from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_magmax(view: View, *, lambda_: float = 1.0) -> Combine:
    """`θ_0 + λ τ`, each entry of τ that of the task vector where it is largest in magnitude; of equals the later one's.

    Reference:
        Marczak et al. 2024, arXiv:2407.06322; who wins among equals as in FusionBench.
    """
    return Combine(_add_largest, (lambda_,))


def _add_largest(elements: Elements, scale: float) -> Leaf:
    xp, largest = elements.xp, elements.deltas[0]
    for delta in elements.deltas[1:]:
        largest = xp.where(xp.abs(delta) >= xp.abs(largest), delta, largest)
    return elements.base + largest * scale


MAGMAX = Method(merge_magmax, "entries of largest magnitude of the task vectors", "arXiv:2407.06322")
