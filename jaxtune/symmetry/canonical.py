"""A transformer's weights without what nothing can see: norms folded into their readers, writers centred.

In a pre-LN transformer the gain of a norm hides which rotations leave the function alone, a value bias is an
output bias in disguise, a key bias does nothing, and the mean of the stream is never read. `fold` rewrites the
weights so that only what matters is left; there the stream may turn by any rotation that keeps the ones vector
and each head by any invertible map. `unfold` brings a change of the folded weights back to a network as it is.
"""

from dataclasses import dataclass, replace

import numpy as np

from jaxtune.errors import SpecError
from jaxtune.symmetry.groups import Group
from jaxtune.symmetry.spec import Form, Spec, make_spec
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Params

# A gain below this share of the norm's median gain would blow up what is divided by it.
GAIN_FLOOR = 0.05
KIND_OF_ROLE = {"stream": "centred_orthogonal", "qk": "general_linear", "vo": "general_linear"}


@dataclass(frozen=True)
class Unfolded:
    """A change of a network's own weights.

    Attributes:
        task_vector: Tree as the network's, float64.
        lost: Leaf -> share of the folded change (in norm) that the network's own form cannot hold: rows behind
            a gain near zero, and what a diagonal entry norm cannot turn into.
    """

    task_vector: dict
    lost: dict[str, float]


def canonical_spec(spec: Spec) -> Spec:
    """The symmetry of folded weights: rotations of the stream, invertible maps inside heads.

    Raises:
        SpecError: the family declares no form, or its stream has an order per junction.
    """
    form = _form_of(spec)
    groups = [replace(group, kind=KIND_OF_ROLE.get(group.role, group.kind)) for group in spec.groups.values()]
    gone = _dropped(form)
    axes = {
        path: tuple(None if axis is None else axis.mark for axis in row)
        for path, row in spec.axes.items()
        if path not in gone
    }
    for entry in form.entries:
        stream = axes[entry.bias][0]
        before = f"{stream}_before_norm"
        groups.append(Group(before, spec.groups[stream].size, "centred_orthogonal", role="stream"))
        axes[entry.scale] = (before, stream)
        for path in entry.writers:
            axes[path] = (*axes[path][:-1], before)
    return make_spec(groups, axes, unmatched=spec.unmatched - gone, junctions=spec.junctions, form=form)


def fold(spec: Spec, params: Params, *, dtype: type = np.float64) -> dict:
    """The weights in canonical form; computes the same function, with norms that only normalise.

    Leaves keep their paths. Gains, value and key biases are gone; the offset of a norm stays, divided by its
    gain, where a reader has no bias to take it; the gain of an entry norm becomes a matrix.

    Args:
        spec: Symmetry of the network, not of its canonical form.
        params: Its weights.
        dtype: Of the result. Each step is computed in float64; float32 holds half as much at any time.

    Raises:
        SpecError: the family declares no form, or a gain is zero before a reader without a bias.
    """
    form, leaves = _form_of(spec), _Leaves(flatten(params), dtype)
    for norm in form.norms:
        gain, offset = leaves[norm.scale], leaves[norm.bias]
        keeps_offset = _keeps_offset(norm)
        if keeps_offset:
            if (np.abs(gain) < np.finfo(np.float32).tiny).any():
                raise SpecError(f"{norm.scale}: a gain of zero before {norm.readers[0].kernel}, which has no bias.")
            leaves[norm.bias] = offset / gain
        for reader in norm.readers:
            kernel = leaves[reader.kernel]
            if not keeps_offset:
                leaves[reader.bias] = leaves[reader.bias] + _read(offset, kernel)
            kernel = _rows(gain, kernel) * kernel
            # What is read has mean zero, so the mean row of a reader is never seen.
            leaves[reader.kernel] = kernel if keeps_offset else kernel - kernel.mean(axis=0, keepdims=True)
    for attention in form.attentions:
        leaves[attention.out_bias] = leaves[attention.out_bias] + _write(
            leaves[attention.v_bias], leaves[attention.out_kernel]
        )
    for entry in form.entries:
        leaves[entry.scale] = np.diag(leaves[entry.scale])
    for path in (*form.writers, *(path for entry in form.entries for path in (entry.scale, entry.bias))):
        leaves[path] = leaves[path] - leaves[path].mean(axis=-1, keepdims=True)
    return unflatten({path: leaves.rounded(path) for path in leaves if path not in _dropped(form)})


def realise(spec: Spec, folded: Params, like: Params) -> dict:
    """Folded weights as a network of the family: every gain 1, every hidden bias 0, in the dtypes of `like`.

    Raises:
        SpecError: the family has an entry norm, whose folded matrix no gain can hold.
    """
    form, leaves = _form_of(spec), flatten(folded)
    if form.entries:
        raise SpecError(f"{form.entries[0].scale}: a folded entry norm is a matrix; the network has a gain there.")
    gains = {norm.scale for norm in form.norms}
    result = {}
    for path, leaf in flatten(like).items():
        default = np.ones(leaf.shape) if path in gains else np.zeros(leaf.shape)
        result[path] = np.asarray(leaves.get(path, default)).astype(leaf.dtype)
    return unflatten(result)


def unfold(spec: Spec, vector: Params, base: Params) -> Unfolded:
    """A change of folded weights as a change of `base`'s own: folding `base + change` adds `vector`.

    Exact up to what `lost` says. Gains stay as they are: what fine-tuning did to a gain is in its readers.

    Args:
        spec: Symmetry of the network, not of its canonical form.
        vector: Difference of two folded trees.
        base: The network that takes the change.

    Raises:
        SpecError: the family declares no form.
    """
    form, change, own = _form_of(spec), _wide(vector), _wide(base)
    result = {path: change.get(path, np.zeros_like(leaf)) for path, leaf in own.items()}
    lost = {}
    for entry in form.entries:
        centring = np.eye(len(own[entry.scale])) - 1 / len(own[entry.scale])
        wanted = change[entry.scale]
        # The diagonal that comes closest, row by row.
        result[entry.scale] = np.sum(centring * wanted, axis=1) / np.sum(centring**2, axis=1)
        lost[entry.scale] = _share(wanted - result[entry.scale][:, None] * centring, wanted)
    for norm in form.norms:
        gain, offset = own[norm.scale], own[norm.bias]
        floor = GAIN_FLOOR * np.median(np.abs(gain))
        divisor = np.where(np.abs(gain) < floor, np.where(gain < 0, -floor, floor), gain)
        divisor = np.where(gain == 0, np.inf, divisor)  # nothing behind a dead gain is ever read
        if _keeps_offset(norm):
            result[norm.bias] = gain * change[norm.bias]
        for reader in norm.readers:
            wanted = change[reader.kernel]
            result[reader.kernel] = wanted / _rows(divisor, wanted)
            if (divisor != gain).any():
                lost[reader.kernel] = _share(wanted - _rows(gain, wanted) * result[reader.kernel], wanted)
            if not _keeps_offset(norm) and reader.bias not in _free(form):
                taken = change.get(reader.bias, 0.0)  # a value bias has moved on to the output
                result[reader.bias] = taken - _read(offset, result[reader.kernel])
    norm_of = {reader.kernel: norm for norm in form.norms for reader in norm.readers}
    for attention in form.attentions:
        offset = own[norm_of[attention.v_kernel].bias]
        seen = own[attention.v_bias] + _read(offset, own[attention.v_kernel])
        result[attention.out_bias] = change[attention.out_bias] - _write(seen, change[attention.out_kernel])
    for path, leaf in flatten(base).items():
        if not is_float(leaf):
            result[path] = np.zeros_like(leaf)
    return Unfolded(unflatten(result), lost)


class _Leaves(dict):
    """Leaves that are read in float64 and kept in `dtype`, so that a network is never held whole in float64."""

    def __init__(self, leaves, dtype):
        super().__init__(leaves)
        self.dtype = dtype

    def __getitem__(self, path):
        leaf = super().__getitem__(path)
        return np.asarray(leaf, np.float64) if is_float(leaf) else leaf

    def __setitem__(self, path, leaf):
        super().__setitem__(path, leaf.astype(self.dtype))

    def rounded(self, path):
        leaf = super().__getitem__(path)
        return np.asarray(leaf, self.dtype) if is_float(leaf) else leaf


def _form_of(spec) -> Form:
    if spec.form is None:
        raise SpecError(
            "this family declares no canonical form (a pre-LN transformer does), so its norms cannot be folded; "
            "use a transport that needs none: permutation, transfusion, identity."
        )
    if not spec.is_exact:
        raise SpecError('folded weights need one stream for the whole stack: the symmetry with junctions="shared".')
    return spec.form


def _dropped(form):
    """Leaves of the network that folded weights have no use for."""
    gains = {norm.scale for norm in form.norms} | {norm.bias for norm in form.norms if not _keeps_offset(norm)}
    biases = {path for attention in form.attentions for path in (attention.v_bias, attention.k_bias)}
    return gains | biases


def _free(form):
    """Biases that no output can see."""
    return {attention.k_bias for attention in form.attentions}


def _keeps_offset(norm):
    return any(reader.bias is None for reader in norm.readers)


def _wide(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf, np.float64) if is_float(leaf) else leaf for path, leaf in flatten(tree).items()}


def _rows(vector, kernel):
    """A vector over the first axis of a kernel, ready to multiply it."""
    return vector.reshape(-1, *[1] * (kernel.ndim - 1))


def _read(vector, kernel):
    """What a kernel makes of a constant stream."""
    return np.tensordot(vector, kernel, axes=1)


def _write(values, kernel):
    """What an output kernel [heads, units, width] makes of constant values [heads, units]."""
    return np.tensordot(values, kernel, axes=2)


def _share(missing: np.ndarray, wanted: np.ndarray) -> float:
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(missing)) / norm if norm else 0.0
