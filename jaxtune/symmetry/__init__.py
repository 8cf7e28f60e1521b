"""Declare what a network's weights may do without changing its function; apply, compose, invert it."""

from jaxtune.symmetry.element import Element, apply, check, compose, identity, invert, random
from jaxtune.symmetry.form import Attention, BranchGain, EntryNorm, Form, Norm, Reader, Tie
from jaxtune.symmetry.groups import Group, Kind
from jaxtune.symmetry.kinds import KINDS
from jaxtune.symmetry.spec import Axis, Spec, make_spec

__all__ = [
    "KINDS", "Attention", "Axis", "BranchGain", "Element", "EntryNorm", "Form", "Group", "Kind", "Norm", "Reader",
    "Spec", "Tie", "apply", "check", "compose", "identity", "invert", "make_spec", "random",
]  # fmt: skip
