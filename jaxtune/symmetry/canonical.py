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
from jaxtune.lazy import LazyLeaf, is_lazy
from jaxtune.symmetry.folding import Folding
from jaxtune.symmetry.form import Form
from jaxtune.symmetry.groups import Group
from jaxtune.symmetry.spec import Spec, make_spec
from jaxtune.symmetry.unfolding import Unfolding
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Leaf, Params


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
    gone = form.dropped
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


def fold(spec: Spec, params: Params, *, dtype: type | None = None) -> dict:
    """The weights in canonical form; computes the same function, with norms that only normalise.

    Leaves keep their paths; a tied readout gets one of its own. Gains, hidden value and key biases are gone; the
    offset of a norm stays, divided by its gain, where a reader has no bias to take it; the gain of a branch is in its
    writers; the gain of an entry norm becomes a matrix. Where a leaf is lazy (`jaxtune.lazy`), so are all of the
    result: each is made when it is read, from the few leaves that it needs, bit for bit the same.

    Args:
        spec: Symmetry of the network, not of its canonical form.
        params: Its weights.
        dtype: Of the result, None: float64 where a leaf is, else float32. Each leaf is computed in float64.

    Raises:
        SpecError: the family declares no form, or a gain is zero before a reader without a bias that an offset
            would need.
    """
    leaves = flatten(params)
    folding = Folding(_form_of(spec), leaves, dtype or _wide_dtype(leaves))
    folding.check_gains()
    is_deferred = _has_lazy(leaves)

    def make(path):
        return LazyLeaf(*folding.kind_of(path), lambda: folding.leaf(path)) if is_deferred else folding.leaf(path)

    return unflatten({path: make(path) for path in folding.paths()})


def realise(spec: Spec, folded: Params, like: Params) -> dict:
    """Folded weights as a network of the family: every gain 1, every hidden bias 0, in the dtypes of `like`.

    Raises:
        SpecError: the family has an entry norm, whose folded matrix no gain can hold, or a tied table, which cannot
            be two leaves.
    """
    form, leaves = _form_of(spec), flatten(folded)
    _refuse_unrealisable(form)
    gains = {norm.scale for norm in form.norms if not norm.counts_from_one} | {gain.scale for gain in form.gains}

    def fill(path: str, leaf: Leaf) -> Leaf:
        if path not in leaves:
            return np.full(leaf.shape, path in gains, leaf.dtype)
        found = leaves[path]
        return (found if is_lazy(found) else np.asarray(found)).astype(leaf.dtype)

    return unflatten({path: fill(path, leaf) for path, leaf in flatten(like).items()})


def is_folded(spec: Spec) -> bool:
    """Whether a spec is one of folded weights."""
    return spec.form is not None and not any(path in spec.axes for path in spec.form.dropped)


def lay_out(form: Form, folded: Params) -> dict:
    """Folded weights as a network of the family, as `realise` makes it, in the folded dtype; traceable.

    Raises:
        SpecError: as `realise`.
    """
    _refuse_unrealisable(form)
    leaves = flatten(folded)

    def full(like, axes, value):
        like = leaves[like]
        return np.full(tuple(like.shape[axis] for axis in axes), value, like.dtype)

    rest = {}
    for norm in form.norms:
        reader = norm.readers[0]
        for path, value in ((norm.scale, 0 if norm.counts_from_one else 1), (norm.bias, 0)):
            if path is not None:
                rest[path] = full(reader.kernel, (reader.axis,), value)
    for attention in form.attentions:
        for path in (attention.v_bias, attention.k_bias):
            if path is not None:
                rest[path] = full(attention.v_kernel, range(1, len(leaves[attention.v_kernel].shape)), 0)
    rest |= {gain.scale: full(gain.writers[0], (-1,), 1) for gain in form.gains}
    return unflatten(rest | leaves)


def can_realise(form: Form) -> bool:
    """Whether the family has a place for every folded leaf, whatever has moved it."""
    return not form.entries and form.tie is None


def unfold(spec: Spec, vector: Params, base: Params, *, dtype: type | None = None) -> Unfolded:
    """A change of folded weights as a change of `base`'s own: folding `base + change` adds `vector`.

    Exact up to what `lost` says. Gains stay as they are: what fine-tuning did to a gain is in its readers. Only the
    gain before a tied readout changes too, as its reader is a writer and cannot take everything. Lazy as in `fold`;
    what is lost is measured at once, which reads those leaves alone that can lose something.

    Args:
        spec: Symmetry of the network, not of its canonical form.
        vector: Difference of two folded trees.
        base: The network that takes the change.
        dtype: Of the result, None: float64 where a leaf is, else float32. Each leaf is computed in float64.

    Raises:
        SpecError: the family declares no form.
    """
    change, leaves = flatten(vector), flatten(base)
    unfolding = Unfolding(_form_of(spec), change, leaves, dtype or _wide_dtype(change | leaves))
    is_deferred = _has_lazy(change) or _has_lazy(leaves)

    def make(path):
        if not is_deferred:
            return unfolding.leaf(path)
        return LazyLeaf(leaves[path].shape, unfolding.dtype_of(path), lambda: unfolding.leaf(path))

    return Unfolded(unflatten({path: make(path) for path in leaves}), unfolding.lost())


def _refuse_unrealisable(form):
    if form.entries:
        raise SpecError(f"{form.entries[0].scale}: a folded entry norm is a matrix; the network has a gain there.")
    if form.tie is not None:
        raise SpecError(f"{form.tie.table}: folded, the tied table is two leaves; the network has one.")


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


def _wide_dtype(leaves):
    return np.float64 if any(leaf.dtype == np.float64 for leaf in leaves.values()) else np.float32


def _has_lazy(leaves):
    return any(map(is_lazy, leaves.values()))
