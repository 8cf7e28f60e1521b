"""Which axis of which leaf moves with which group: the symmetry of a network, declared as data.

A model writes one table, path -> axes, for instance (8 heads of 16 units, width 128):

    "block_0/attn/q/kernel": ("stream", "block_0/attn/head", "block_0/attn/qk"),
    "block_0/attn/k/kernel": ("stream", "block_0/attn/head", "block_0/attn/qk*"),
    "patch/kernel": (None, None, None, "stream"),

None declares an axis fixed; nothing else is. A star marks the dual side, where the inverse transpose
acts: for permutations the same, for general linear maps inside a head not. A tilde marks an axis that follows the
order of the units and nothing else: behind a batch norm's input no scale is seen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jaxtune.errors import SpecError
from jaxtune.symmetry.form import Form
from jaxtune.symmetry.groups import Group
from jaxtune.symmetry.kinds import kind_of
from jaxtune.tree import MAX_LINES, flatten
from jaxtune.types import Params


@dataclass(frozen=True)
class Axis:
    """Owner of one axis of one leaf.

    Attributes:
        group: Name of the owner.
        dual: Whether the inverse transpose acts.
        order_only: Whether the order of the units acts without their signs or scales.
    """

    group: str
    dual: bool = False
    order_only: bool = False

    @property
    def mark(self) -> str:
        """As `make_spec` reads it: "group", "group*" or "group~"."""
        return self.group + ("*" if self.dual else "~" if self.order_only else "")

    @property
    def dualised(self) -> "Axis":
        """What acts on what a kernel reads along this axis: the inverse transpose; an order is its own."""
        return self if self.order_only else Axis(self.group, dual=not self.dual)


@dataclass(frozen=True)
class Spec:
    """The declared symmetry of one architecture.

    Attributes:
        groups: Name -> group.
        axes: Path -> owner of each axis, None where it is fixed.
        unmatched: Paths that move but say nothing about which unit is which (a key bias, to which
            softmax is blind; running statistics); alignment leaves them out.
        nonnegative: Paths that stay >= 0 whatever is added to them (running variances).
        junctions: Names of the stream groups from the first to the last. One name: one order for the
            whole stack, an exact symmetry. Several: one order per junction (TransFusion), exact only
            for a network with explicit shortcut matrices.
        form: Where the norms are that `symmetry.canonical` folds; None where they cannot be folded.
        no_form: Why not, in words that follow "this network has no canonical form: ".
    """

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis | None, ...]]
    unmatched: frozenset[str] = frozenset()
    nonnegative: frozenset[str] = frozenset()
    junctions: tuple[str, ...] = ()
    form: Form | None = None
    no_form: str | None = None
    _leaves_of: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict, repr=False)

    @property
    def is_exact(self) -> bool:
        """Whether every element leaves the stock network's function unchanged."""
        return len(self.junctions) <= 1

    def leaves_of(self, group: str) -> tuple[tuple[str, int], ...]:
        """(path, axis) of everything `group` owns."""
        return self._leaves_of[group]

    def count_of(self, group: str) -> int | None:
        """Number of elements that `group` has: one per unit of its parent, or None without a parent."""
        parent = self.groups[group].parent
        return None if parent is None else self.groups[parent].size

    def children_of(self, group: str) -> list[str]:
        """Names of the groups whose parent is `group`."""
        return [name for name, child in self.groups.items() if child.parent == group]

    def check(self, params: Params) -> None:
        """Checks the spec against a tree, both ways.

        Raises:
            SpecError: a leaf of `params` that the spec does not know, a declared leaf that `params`
                lacks, or an axis whose length is not its group's size; lists them all.
        """
        leaves = flatten(params)
        lines = [f"  {path}: not in the spec" for path in leaves if path not in self.axes]
        lines += [f"  {path}: in the spec, missing from the tree" for path in self.axes if path not in leaves]
        for path, axes in self.axes.items():
            if path not in leaves:
                continue
            shape = tuple(leaves[path].shape)
            if len(shape) != len(axes):
                lines.append(f"  {path}: the spec has {len(axes)} axes, the leaf {list(shape)} has {len(shape)}")
                continue
            for position, axis in enumerate(axes):
                if axis and shape[position] != self.groups[axis.group].size:
                    size = self.groups[axis.group].size
                    lines.append(
                        f"  {path}: axis {position} of {list(shape)} belongs to group {axis.group} of size {size}"
                    )
        if lines:
            more = [f"  ... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
            raise SpecError(
                f"the tree does not fit its symmetry spec in {len(lines)} places:\n"
                + "\n".join(lines[:MAX_LINES] + more)
                + "\nUse the config that the checkpoint was made with; every axis must be owned or declared fixed."
            )


def make_spec(
    groups: Iterable[Group],
    axes: Mapping[str, tuple[str | None, ...]],
    *,
    unmatched: Iterable[str] = (),
    nonnegative: Iterable[str] = (),
    junctions: Iterable[str] = (),
    form: Form | None = None,
    no_form: str | None = None,
) -> Spec:
    """Builds a spec from a table of axis owners and checks it against itself.

    Args:
        groups: Every group, parents before children or after.
        axes: Path -> owner of each axis; a trailing "*" marks the dual side, "~" an axis that the order alone
            moves, None a fixed axis.
        unmatched, nonnegative, junctions, form, no_form: As in `Spec`.

    Raises:
        SpecError: an owner that is no group, a group that owns nothing, a unit inside a head on a leaf
            without the head's axis, a group twice on one leaf that is matched (what it says of the match is no sum
            over units), a "~" on a group whose units mix, a path in `unmatched` that has no axes.
    """
    unmatched = frozenset(unmatched)
    table: dict[str, Group] = {}
    for group in groups:
        if group.name in table:
            raise SpecError(f"group {group.name} is declared twice.")
        kind_of(group)
        table[group.name] = group
    parsed, owned = {}, {name: [] for name in table}
    for path, owners in axes.items():
        row = tuple(None if owner is None else _read_mark(owner) for owner in owners)
        names = [axis.group for axis in row if axis]
        if len(set(names)) != len(names) and path not in unmatched:
            raise SpecError(f"{path}: a group owns two axes of one leaf: {owners}.")
        for position, axis in enumerate(row):
            if axis is None:
                continue
            if axis.group not in table:
                raise SpecError(f"{path}: axis {position} belongs to {axis.group!r}, which is no group.")
            if axis.order_only and kind_of(table[axis.group]).order is None:
                raise SpecError(f"{path}: {axis.mark} asks for an order, which {table[axis.group].kind} has not.")
            parent = table[axis.group].parent
            if parent is not None and parent not in names:
                raise SpecError(f"{path}: {axis.group} lives inside {parent}, which owns no axis of this leaf.")
            owned[axis.group].append((path, position))
        parsed[path] = row
    for group in table.values():
        if not owned[group.name]:
            raise SpecError(f"group {group.name} owns no axis.")
        if group.parent is not None and table.get(group.parent) is None:
            raise SpecError(f"group {group.name}: its parent {group.parent!r} is no group.")
    for name, paths in (("unmatched", unmatched), ("nonnegative", nonnegative)):
        for path in paths:
            if path not in parsed:
                raise SpecError(f"{name} names {path}, which has no axes declared.")
    for name in junctions:
        if name not in table:
            raise SpecError(f"junctions names {name}, which is no group.")
    return Spec(
        groups=table,
        axes=parsed,
        unmatched=unmatched,
        nonnegative=frozenset(nonnegative),
        junctions=tuple(junctions),
        form=form,
        no_form=no_form,
        _leaves_of={name: tuple(pairs) for name, pairs in owned.items()},
    )


def _read_mark(owner):
    return Axis(owner.rstrip("*~"), dual=owner.endswith("*"), order_only=owner.endswith("~"))
