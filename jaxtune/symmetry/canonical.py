"""A transformer's weights without what nothing can see: norms folded into their readers, writers centred.

In a pre-norm transformer the gain of a norm hides which rotations leave the function alone, a value bias is an
output bias in disguise, a key bias does nothing without rotary positions, and behind layer norms the mean of the stream
is never read. `fold` rewrites the weights so that only what matters is left; there the stream may turn by any rotation
(behind layer norms: any that keeps the ones vector) and each head by any map that its positions allow. `unfold`
brings a change of the folded weights back to a network as it is.
"""

from dataclasses import dataclass, replace

import numpy as np

from jaxtune.errors import SpecError
from jaxtune.symmetry.form import Form
from jaxtune.symmetry.groups import Group
from jaxtune.symmetry.spec import Spec, make_spec
from jaxtune.symmetry.tied import tie_again
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Params

# A gain below this share of the norm's median gain would blow up what is divided by it.
GAIN_FLOOR = 0.05


@dataclass(frozen=True)
class Unfolded:
    """A change of a network's own weights.

    Attributes:
        task_vector: Tree as the network's.
        lost: Leaf -> share of the folded change (in norm) that the network's own form cannot hold: rows behind
            a gain near zero, what a diagonal entry norm cannot turn into, and what a tied table cannot both write
            and read.
    """

    task_vector: dict
    lost: dict[str, float]


def canonical_spec(spec: Spec) -> Spec:
    """The symmetry of folded weights: rotations of the stream, invertible maps inside heads.

    Orders of units inside heads become invertible maps; what a family declares beyond orders stays as declared.

    Raises:
        SpecError: the family declares no form, or its stream has an order per junction.
    """
    form = _form_of(spec)
    rotation = "centred_orthogonal" if form.is_centred else "orthogonal"

    def kind_of(group):
        if group.role == "stream":
            return rotation
        return "general_linear" if group.role in ("qk", "vo") and group.kind == "permutation" else group.kind

    groups = [replace(group, kind=kind_of(group)) for group in spec.groups.values()]
    gone = _dropped(form)
    axes = {
        path: tuple(None if axis is None else axis.mark for axis in row)
        for path, row in spec.axes.items()
        if path not in gone
    }
    if form.tie is not None:
        axes[form.tie.readout] = axes[form.tie.table][::-1]
    streams = [spec.axes[entry.scale][0].group for entry in form.entries]
    for entry, stream in zip(form.entries, streams, strict=True):
        is_only = streams.count(stream) == 1
        before = f"{stream}_before_norm" if is_only else f"{entry.scale.rpartition('/')[0]}/{stream}_before_norm"
        groups.append(Group(before, spec.groups[stream].size, rotation, role="stream"))
        axes[entry.scale] = (before, stream)
        for path in entry.writers:
            axes[path] = (*axes[path][:-1], before)
    return make_spec(groups, axes, unmatched=spec.unmatched - gone, junctions=spec.junctions, form=form)


def fold(spec: Spec, params: Params, *, dtype: type = np.float64) -> dict:
    """The weights in canonical form; computes the same function, with norms that only normalise.

    Leaves keep their paths; a tied readout gets one of its own. Gains, hidden value and key biases are gone; the
    offset of a norm stays, divided by its gain, where a reader has no bias to take it; the gain of a branch is in its
    writers; the gain of an entry norm becomes a matrix.

    Args:
        spec: Symmetry of the network, not of its canonical form.
        params: Its weights.
        dtype: Of the result. Each step is computed in float64; float32 holds half as much at any time.

    Raises:
        SpecError: the family declares no form, or a gain is zero before a reader without a bias that an offset
            would need.
    """
    form, leaves = _form_of(spec), _Leaves(flatten(params), dtype)
    if form.tie is not None:
        leaves[form.tie.readout] = leaves[form.tie.table].T
    for norm in form.norms:
        gain = _gain(norm, leaves)
        keeps_offset = _keeps_offset(norm)
        if keeps_offset:
            if (np.abs(gain) < np.finfo(np.float32).tiny).any():
                raise SpecError(f"{norm.scale}: a gain of zero before {norm.readers[0].kernel}, which has no bias.")
            leaves[norm.bias] = leaves[norm.bias] / gain
        for reader in norm.readers:
            kernel = leaves[reader.kernel]
            if norm.bias is not None and not keeps_offset:
                leaves[reader.bias] = leaves[reader.bias] + _read(leaves[norm.bias], kernel, reader.axis)
            kernel = _along(gain, kernel, reader.axis) * kernel
            if form.is_centred and not keeps_offset and not _is_tied(form, reader):
                # What is read has mean zero, so the mean row of a reader is never seen. A tied one keeps it: it is
                # all that is left of the mean of the table's rows.
                kernel = kernel - kernel.mean(axis=reader.axis, keepdims=True)
            leaves[reader.kernel] = kernel
    for branch in form.gains:
        for path in branch.writers:
            leaves[path] = leaves[path] * _along(leaves[branch.scale], leaves[path], leaves[path].ndim - 1)
    for attention in form.attentions:
        written = _write(leaves[attention.v_bias], leaves[attention.out_kernel])
        leaves[attention.out_bias] = leaves[attention.out_bias] + written
    for entry in form.entries:
        leaves[entry.scale] = np.diag(_gain(entry, leaves))
    if form.is_centred:
        entries = (path for entry in form.entries for path in (entry.scale, entry.bias))
        for path in (*form.writers, *entries):
            leaves[path] = leaves[path] - leaves[path].mean(axis=-1, keepdims=True)
    return unflatten({path: leaves.rounded(path) for path in leaves if path not in _dropped(form)})


def realise(spec: Spec, folded: Params, like: Params) -> dict:
    """Folded weights as a network of the family: every gain 1, every hidden bias 0, in the dtypes of `like`.

    Raises:
        SpecError: the family has an entry norm, whose folded matrix no gain can hold, or a tied table, which cannot
            be two leaves.
    """
    form, leaves = _form_of(spec), flatten(folded)
    if form.entries:
        raise SpecError(f"{form.entries[0].scale}: a folded entry norm is a matrix; the network has a gain there.")
    if form.tie is not None:
        raise SpecError(f"{form.tie.table}: folded, the tied table is two leaves; the network has one.")
    gains = {norm.scale for norm in form.norms if not norm.counts_from_one} | {gain.scale for gain in form.gains}
    result = {}
    for path, leaf in flatten(like).items():
        default = np.ones(leaf.shape) if path in gains else np.zeros(leaf.shape)
        result[path] = np.asarray(leaves.get(path, default)).astype(leaf.dtype)
    return unflatten(result)


def can_realise(form: Form) -> bool:
    """Whether the family has a place for every folded leaf, whatever has moved it."""
    return not form.entries and form.tie is None


def unfold(spec: Spec, vector: Params, base: Params, *, dtype: type = np.float64) -> Unfolded:
    """A change of folded weights as a change of `base`'s own: folding `base + change` adds `vector`.

    Exact up to what `lost` says. Gains stay as they are: what fine-tuning did to a gain is in its readers. Only the
    gain before a tied readout changes too, as its reader is a writer and cannot take everything.

    Args:
        spec: Symmetry of the network, not of its canonical form.
        vector: Difference of two folded trees.
        base: The network that takes the change.
        dtype: Of the result; each leaf is computed in float64.

    Raises:
        SpecError: the family declares no form.
    """
    form, lost, leaves = _form_of(spec), {}, flatten(base)
    change, own, result = (_Leaves(some, dtype) for some in (flatten(vector), leaves, {}))
    for path, leaf in leaves.items():
        if not is_float(leaf):
            dict.__setitem__(result, path, np.zeros_like(leaf))
        else:
            result[path] = change[path] if path in change else np.zeros(leaf.shape)
    for entry in form.entries:
        wanted = change[entry.scale]
        centring = np.eye(len(wanted)) - (1 / len(wanted) if form.is_centred else 0.0)
        # The diagonal that comes closest, row by row.
        result[entry.scale] = np.sum(centring * wanted, axis=1) / np.sum(centring**2, axis=1)
        lost[entry.scale] = _share(wanted - result[entry.scale][:, None] * centring, wanted)
    gains = {norm.scale: _gain(norm, own) for norm in form.norms}
    readouts = {}
    if form.tie is not None:
        for path, leaf in _unfold_tie(form, change, own, gains, lost).items():
            result[path] = leaf
        readouts[form.tie.readout] = result[form.tie.table].T
    for norm in form.norms:
        gain, new_gain = gains[norm.scale], gains[norm.scale] + result[norm.scale]
        divisor = _divisor(gain)
        if _keeps_offset(norm):
            taken = own[norm.bias] * (result[norm.scale] / gain) if result[norm.scale].any() else 0.0
            result[norm.bias] = new_gain * change[norm.bias] + taken
        for reader in norm.readers:
            if reader.kernel not in readouts:
                wanted = change[reader.kernel]
                result[reader.kernel] = wanted / _along(divisor, wanted, reader.axis)
                if (divisor != gain).any():
                    kept = _along(gain, wanted, reader.axis) * result[reader.kernel]
                    lost[reader.kernel] = _share(wanted - kept, wanted)
            if norm.bias is not None and not _keeps_offset(norm) and reader.bias not in _free(form):
                kernel = readouts[reader.kernel] if reader.kernel in readouts else result[reader.kernel]
                result[reader.bias] = -_read(own[norm.bias], kernel, reader.axis)
                if reader.bias in change:  # a value bias has moved on to the output
                    result[reader.bias] = result[reader.bias] + change[reader.bias]
    readers = {reader.kernel: (norm, reader) for norm in form.norms for reader in norm.readers}
    for attention in form.attentions:
        seen = own[attention.v_bias]
        if attention.v_kernel in readers:
            norm, reader = readers[attention.v_kernel]
            if norm.bias is not None and not _keeps_offset(norm):
                seen = seen + _read(own[norm.bias], own[attention.v_kernel], reader.axis)
        result[attention.out_bias] = change[attention.out_bias] - _write(seen, change[attention.out_kernel])
    for branch in form.gains:
        gain, divisor = own[branch.scale], _divisor(own[branch.scale])
        for path in branch.writers:
            wanted, last = result[path], result[path].ndim - 1
            result[path] = wanted / _along(divisor, wanted, last)
            if (divisor != gain).any():
                lost[path] = _share(wanted - _along(gain, wanted, last) * result[path], wanted)
    return Unfolded(unflatten(dict(result)), lost)


def _unfold_tie(form, change, own, gains, lost):
    """Changes of the tied table and of the gain before its readout."""
    tie, table = form.tie, own[form.tie.table]
    gain = np.ones(table.shape[1]) if tie.scale is None else gains[tie.scale]
    written = table - table.mean(axis=1, keepdims=True) if form.is_centred else table
    wishes = change[tie.table], change[tie.readout].T
    found = tie_again(
        written + wishes[0],
        table * gain + wishes[1],
        gain,
        is_centred=form.is_centred,
        # Other readers of the same norm would feel its gain.
        keep_gain=tie.scale is None or len(next(norm for norm in form.norms if norm.scale == tie.scale).readers) > 1,
    )
    for path, missing, wish in (
        (tie.table, found.lost_table, wishes[0]),
        (tie.readout, found.lost_readout, wishes[1]),
    ):
        lost[path] = missing / float(np.linalg.norm(wish)) if wish.any() else 0.0
    return {tie.table: found.table - table} | ({} if tie.scale is None else {tie.scale: found.gain - gain})


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
        reason = "the family declares none (a pre-norm transformer does)" if spec.no_form is None else spec.no_form
        raise SpecError(
            f"this network declares no canonical form: {reason}, so its norms cannot be folded; "
            "use a transport that needs none: permutation, identity."
        )
    if not spec.is_exact:
        raise SpecError('folded weights need one stream for the whole stack: the symmetry with junctions="shared".')
    return spec.form


def _dropped(form):
    """Leaves of the network that folded weights have no use for."""
    gains = {one.scale for one in (*form.norms, *form.gains)}
    offsets = {norm.bias for norm in form.norms if norm.bias is not None and not _keeps_offset(norm)}
    biases = {path for attention in form.attentions for path in (attention.v_bias, attention.k_bias) if path}
    return gains | offsets | biases


def _free(form):
    """Biases that no output can see."""
    return {attention.k_bias for attention in form.attentions}


def _gain(norm, leaves):
    """What a norm multiplies by."""
    return 1.0 + leaves[norm.scale] if norm.counts_from_one else leaves[norm.scale]


def _divisor(gain):
    """A gain to divide by: away from zero, and infinite where it is zero, as nothing behind a dead gain matters."""
    floor = GAIN_FLOOR * np.median(np.abs(gain))
    divisor = np.where(np.abs(gain) < floor, np.where(gain < 0, -floor, floor), gain)
    return np.where(gain == 0, np.inf, divisor)


def _is_tied(form, reader):
    return form.tie is not None and reader.kernel == form.tie.readout


def _keeps_offset(norm):
    return norm.bias is not None and any(reader.bias is None for reader in norm.readers)


def _along(vector, kernel, axis):
    """A vector over one axis of a kernel, ready to multiply it."""
    return vector.reshape([-1 if position == axis else 1 for position in range(kernel.ndim)])


def _read(vector, kernel, axis):
    """What a kernel makes of a constant stream."""
    return np.tensordot(vector, kernel, axes=(0, axis))


def _write(values, kernel):
    """What an output kernel [heads, (queries,) units, width] makes of constant values [heads, units]."""
    if kernel.ndim == 4:
        return np.einsum("gu,gquw->w", values, kernel)
    return np.tensordot(values, kernel, axes=2)


def _share(missing: np.ndarray, wanted: np.ndarray) -> float:
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(missing)) / norm if norm else 0.0
