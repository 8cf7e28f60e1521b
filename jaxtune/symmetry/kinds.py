"""The kinds of symmetry by name.

Everything else in the package goes through this table, so a new kind is one more row and no special case.
"""

from jaxtune.errors import SpecError
from jaxtune.symmetry.groups import Group, Kind
from jaxtune.symmetry.linear import CENTRED_ORTHOGONAL, GENERAL_LINEAR, ORTHOGONAL
from jaxtune.symmetry.monomial import SCALED_PERMUTATION, SIGNED_PERMUTATION
from jaxtune.symmetry.permutations import PERMUTATION
from jaxtune.symmetry.rotary import ROTARY, ROTARY_SIGNS

KINDS: dict[str, Kind] = {
    "permutation": PERMUTATION,
    "signed_permutation": SIGNED_PERMUTATION,
    "scaled_permutation": SCALED_PERMUTATION,
    "orthogonal": ORTHOGONAL,
    "centred_orthogonal": CENTRED_ORTHOGONAL,
    "general_linear": GENERAL_LINEAR,
    "rotary": ROTARY,
    "rotary_signs": ROTARY_SIGNS,
}


def kind_of(group: Group) -> Kind:
    """The row of `KINDS` for `group`; `SpecError` where there is none."""
    if group.kind not in KINDS:
        raise SpecError(f"group {group.name}: unknown kind {group.kind!r}; known: {', '.join(KINDS)}.")
    return KINDS[group.kind]
