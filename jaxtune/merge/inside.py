"""Running one registered method inside another: on the blocks of a subspace, or before a step on its result."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.merge.arrays import ArrayView
from jaxtune.merge.options import check_options
from jaxtune.merge.view import Elements
from jaxtune.types import Leaf

# What Combine carries of an inner method: its name, its options in an order of their own, and names of the leaf.
Inner = tuple[str, tuple[tuple[str, Any], ...], str]


class _InnerView(ArrayView):
    """One array of each task, with the random streams of the leaf they were made of."""

    streams: tuple

    def whole(self, leaf: int) -> Elements:
        """As `ArrayView.whole`."""
        whole = super().whole(leaf)
        return Elements(whole.xp, whole.models, whole.base, whole.start, self.streams)


def freeze_inner(name: str, options: Mapping[str, Any] | None, view: Any) -> Inner:
    """An inner method with all its options, checked, as a constant that is compiled in.

    Raises:
        ConfigError: an option of it makes no sense, or it does not take that many task vectors.
        UnknownNameError: no such option.
    """
    method = _find(name)
    full = check_options(method, options or {}, view.num_models, has_base=method.base != "none", name=name)
    return name, tuple((option, _freeze(value)) for option, value in full.items()), view.name


def check_inner(options: Mapping[str, Any], *, elementwise: bool) -> None:
    """Checks the options `inside` and `inside_options` of a method that runs another.

    Raises:
        ConfigError: the method is none that can run there, or `inside_options` no mapping.
        UnknownNameError: no such method.
    """
    method = _find(options["inside"])
    given = options["inside_options"]
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"option 'inside_options': expected options by name, got {given!r}.")
    unit = method.unit_of({**method.options, **(given or {})})
    if elementwise and unit == "leaf":
        raise ConfigError(f"option 'inside': {options['inside']!r} works on whole matrices, not on entries or rows.")
    if method.data != "none" or "inside" in method.options or method.num_models[1] is not None:
        raise ConfigError(f"option 'inside': {options['inside']!r} cannot run inside another method.")


def merge_inside(
    elements: Elements, blocks: Sequence[Leaf], base: Leaf | None, inner: Inner, input_axis: int = -1
) -> Leaf:
    """What the inner method makes of one block a task.

    Args:
        elements: The leaf: its random streams are the inner method's.
        blocks: Of the same shape: task vectors in a subspace, where `base` is None; else models.
        base: Theirs; None: zero.
        inner: Of `freeze_inner`.
        input_axis: Of the blocks.

    Returns:
        Of the blocks' shape: the merged task vector, or the merged model.
    """
    name, frozen, leaf_name = inner
    method, options = _find(name), dict(frozen)
    base = elements.xp.zeros_like(blocks[0]) if base is None else base
    bases = [None if method.base == "none" else base]
    view = _InnerView([leaf_name], [blocks], bases, unit=method.unit_of(options), input_axis=input_axis)
    view.streams = elements.streams
    # The view computes in float64 where it can; around it goes on what came in.
    return view.fold_back(0, method.prepare(view, options)(view.whole(0))).astype(blocks[0].dtype)


def _find(name):
    from jaxtune.merge.registry import METHODS  # which has the methods that run others, too

    if name not in METHODS:
        raise unknown_name("value of the option 'inside'", str(name), METHODS)
    return METHODS[name]


def _freeze(value):
    return tuple(_freeze(one) for one in value) if isinstance(value, list | tuple) else value
