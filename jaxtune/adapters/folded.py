"""Factors in the coordinates of folded weights (`symmetry.canonical`), where gains of norms lie in what reads them."""

from collections.abc import Iterable, Mapping

import numpy as np

from jaxtune.adapters.binding import Matrix
from jaxtune.errors import SpecError
from jaxtune.symmetry.spec import Spec
from jaxtune.symmetry.unfolding import GAIN_FLOOR
from jaxtune.types import Leaf

INSTEAD = "Move the weights instead, and cut the adapter out of them (`extract_adapter`), or ask for full weights."


class Gains:
    """What the input side of every kernel is multiplied by before it moves, and divided by afterwards."""

    def __init__(self, spec: Spec, source: Mapping[str, Leaf], target: Mapping[str, Leaf]):
        """
        Args:
            spec: Of the networks themselves, not of their folded weights.
            source, target: Path -> leaf of either base; gains of norms are read.

        Raises:
            SpecError: the family declares no form, or its layer norms fold into biases, which factors do not have.
        """
        if spec.form is None or spec.form.is_centred:
            reason = (
                "declares no canonical form" if spec.form is None else "has layer norms, which fold into biases too"
            )
            raise SpecError(f"this network {reason}; its factors cannot move one by one. {INSTEAD}")
        self._form, self._source, self._target = spec.form, source, target
        self._norm_of = {reader.kernel: (norm, reader.axis) for norm in spec.form.norms for reader in norm.readers}

    def check(self, matrices: Iterable[Matrix], changed: Iterable[str]) -> None:
        """Checks that folding the adapter changes factors alone.

        Args:
            matrices: With factors.
            changed: Stored names of tensors that the adapter replaces by other values.

        Raises:
            SpecError: it changes more; names it.
        """
        for name in changed:
            raise SpecError(
                f"{name} is replaced by the adapter, and folding spreads that over other weights. {INSTEAD}"
            )
        hides = {attention.out_kernel for attention in self._form.attentions}
        tied = {self._form.tie.table} if self._form.tie else set()
        for matrix in matrices:
            for path in matrix.row.leaves:
                if path in hides | tied:
                    what = "a value bias passes through it" if path in hides else "it is tied to the readout"
                    raise SpecError(f"{matrix.name} has factors, and {what} when weights are folded. {INSTEAD}")

    def multiply(self, path: str, view: np.ndarray) -> np.ndarray:
        """The input factor of the leaf at `path`, by the source's gain."""
        return view * self._along(path, view, self._source)

    def divide(self, path: str, view: np.ndarray) -> np.ndarray:
        """The moved one, by the target's gain.

        Raises:
            SpecError: a gain so small that dividing by it would blow up what is divided.
        """
        gain = self._along(path, view, self._target)
        if path in self._norm_of and (np.abs(gain) < GAIN_FLOOR * np.median(np.abs(gain))).any():
            raise SpecError(f"{self._norm_of[path][0].scale} of the target has gains near zero. {INSTEAD}")
        return view / gain

    def _along(self, path, view, leaves):
        if path not in self._norm_of:
            return np.ones((1,) * view.ndim, view.dtype)
        norm, axis = self._norm_of[path]
        gain = np.asarray(leaves[norm.scale]).astype(view.dtype)
        gain = 1 + gain if norm.counts_from_one else gain
        return gain.reshape([-1 if n == axis else 1 for n in range(view.ndim)])
