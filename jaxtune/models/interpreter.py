"""Runs a jaxpr operation by operation, and notes what every parameter is multiplied with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxtune.models.inputs import at_least_float32
from jaxtune.models.views import View, follow, in_order_of_leaf, leaf_axes, view_of_leaf

# Primitives that only wrap a program, and the parameter that holds it.
WRAPPERS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "outputs", "mask", "gradients"],
    meta_fields=["in_axes", "order", "num_uses"],
)
@dataclass(frozen=True)
class Site:
    """One matrix at work: `outputs == inputs @ kernel`, a row for every example and token.

    Attributes:
        inputs: What it reads; the axes that it sums over as one, in the order of the leaf.
        outputs: What it makes, before any bias; the leaf's other axes as one.
        in_axes: The leaf's axes that are summed over: (0,) of a dense kernel, (0, 1) of `attn/out/kernel`, (1,) of a
            token table that is read as a head.
        mask: True in the rows of real tokens; None where every row is real.
        gradients: Of a loss with respect to `outputs`, from `record_gradients`; None otherwise.
        order: How many matrices are used before this one; a dict that comes out of `jit` is sorted by name.
        num_uses: How often it is used; the rows of all uses stand one use after the other.

    Shapes:
        inputs: float[M, n_in]; outputs, gradients: float[M, n_out], float32 or wider; mask: bool[M]. Rows of a use are
            sorted by example: M / N / num_uses rows for each of N examples.
    """

    inputs: jax.Array
    outputs: jax.Array
    in_axes: tuple[int, ...]
    mask: jax.Array | None = None
    gradients: jax.Array | None = None
    order: int = 0
    num_uses: int = 1


class Tap:
    """Runs a jaxpr and notes where parameters are multiplied.

    Attributes:
        pushed: Path -> what is added to the outputs of the matrix there, float[M, n_out].
        uses: Path -> its uses so far, in their order.
    """

    def __init__(self, pushed: Mapping[str, jax.Array]):
        self.pushed = pushed
        self.uses: dict[str, list[Site]] = {}

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], views: Sequence[View | None]) -> list:
        """Results of a jaxpr; `views` say which arguments are parameters, seen how."""
        values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))
        known = {var: view for var, view in zip(jaxpr.invars, views, strict=True) if view is not None}
        for equation in jaxpr.eqns:
            inputs = [var.val if isinstance(var, Literal) else values[var] for var in equation.invars]
            seen = [None if isinstance(var, Literal) else known.get(var) for var in equation.invars]
            results, shown = self._evaluate(equation, inputs, seen)
            values.update(zip(equation.outvars, results, strict=True))
            known.update({var: view for var, view in zip(equation.outvars, shown, strict=True) if view is not None})
        self.last_views = [None if isinstance(var, Literal) else known.get(var) for var in jaxpr.outvars]
        return [var.val if isinstance(var, Literal) else values[var] for var in jaxpr.outvars]

    def _evaluate(self, equation, inputs, seen):
        """(values, views) of an equation's results."""
        name, params = equation.primitive.name, equation.params
        nothing = [None] * len(equation.outvars)
        if any(seen) and name in WRAPPERS:
            inner = params[WRAPPERS[name]]
            jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            return self.run(jaxpr, consts, inputs, seen), self.last_views
        if any(seen) and name == "dot_general" and not any(params["dimension_numbers"][1]):
            kernel = _matrix_among(seen)
            if kernel is not None:
                found = self._multiply(equation, inputs, seen, kernel)
                if found is not None:
                    return [found], nothing
        if name == "conv_general_dilated" and seen[1] is not None:
            found = self._convolve(equation, inputs, seen[1])
            if found is not None:
                return [found], nothing
        results = _bind(equation, inputs)
        if any(seen) and len(results) == 1 and seen[0] is not None:
            return results, [follow(seen[0], name, params)]
        return results, nothing

    def _multiply(self, equation, inputs, seen, kernel):
        """The product, noted; None where the kernel is summed over in part."""
        contracted = equation.params["dimension_numbers"][0]
        view, other = seen[kernel], inputs[1 - kernel]
        summed, matched = list(contracted[kernel]), list(contracted[1 - kernel])
        kept = [axis for axis in range(len(view.axes)) if axis not in summed]
        in_axes = leaf_axes(view, summed)
        if in_axes is None:
            return None
        rows = [axis for axis in range(other.ndim) if axis not in matched]
        row_shape = tuple(other.shape[axis] for axis in rows)
        read = _split(other.transpose([*rows, *matched]).reshape(*row_shape, -1), view, summed)
        (result,) = _bind(equation, inputs)
        num_kept = len(kept)
        # The left operand's axes come first in a product.
        order = [*range(num_kept, result.ndim), *range(num_kept)] if kernel == 0 else list(range(result.ndim))
        made = result.transpose(order)
        sizes, permutation = in_order_of_leaf(view, kept)
        outputs = _split(made.reshape(*row_shape, -1), view, kept)
        if not in_axes:
            in_axes = (0,)  # of size 1: nothing was left to follow
        outputs = self._note(view.path, Site(read, outputs, in_axes))
        if outputs is None:
            return result
        back = outputs.reshape(-1, *(sizes[i] for i in permutation))
        back = back.transpose(0, *(1 + permutation.index(i) for i in range(len(sizes)))).reshape(made.shape)
        return back.transpose([order.index(i) for i in range(result.ndim)]).astype(result.dtype)

    def _convolve(self, equation, inputs, view):
        """The same of a convolution, whose rows are patches."""
        params = equation.params
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
            return None
        image, kernel = inputs
        numbers = params["dimension_numbers"]
        _, features, *window = numbers.rhs_spec
        summed = sorted([features, *window])  # as the leaf has them, if it is itself
        if view != view_of_leaf(view.path, view.shape) or numbers.rhs_spec[0] != kernel.ndim - 1:
            return None
        patches = jax.lax.conv_general_dilated_patches(
            image.transpose(numbers.lhs_spec),
            [kernel.shape[axis] for axis in window],
            params["window_strides"],
            params["padding"],
            rhs_dilation=params["rhs_dilation"],
            precision=jax.lax.Precision.HIGHEST,
        )  # [example, channel and window, *place]
        patches = jnp.moveaxis(patches, 1, -1)
        lead = patches.shape[:-1]
        patches = patches.reshape(*lead, kernel.shape[features], *(kernel.shape[axis] for axis in window))
        held = [features, *window]
        patches = patches.transpose(*range(len(lead)), *(len(lead) + held.index(axis) for axis in summed))
        (result,) = _bind(equation, inputs)
        batch_axis, out_axis, *places = numbers.out_spec
        order = [batch_axis, *places, out_axis]
        made = result.transpose(order)
        num_rows = math.prod(lead)
        site = Site(_wide(patches.reshape(num_rows, -1)), _wide(made.reshape(num_rows, made.shape[-1])), tuple(summed))
        outputs = self._note(view.path, site)
        if outputs is None:
            return result
        back = outputs.reshape(made.shape).transpose([order.index(i) for i in range(result.ndim)])
        return back.astype(result.dtype)

    def _note(self, path, site):
        """Keeps a use; its outputs, pushed, where a push was asked for."""
        uses = self.uses.setdefault(path, [])
        first = sum(len(use.inputs) for use in uses if use.in_axes == site.in_axes)
        uses.append(site)
        push = self.pushed.get(path)
        if push is None or site.in_axes != uses[0].in_axes:
            return None
        return site.outputs + push[first : first + len(site.inputs)]


def _split(values, view, axes):
    """float[..., n] along some axes of a view -> float[M, n] in the order of the leaf."""
    sizes, permutation = in_order_of_leaf(view, axes)
    size = math.prod(sizes)
    values = values.reshape(-1, *sizes).transpose(0, *(1 + axis for axis in permutation))
    return _wide(values.reshape(-1, size))


def _wide(values):
    return values.astype(at_least_float32(values.dtype))


def _matrix_among(seen: list[View | None]) -> int | None:
    """Which operand of a product is the matrix; a single token that is multiplied by one is a parameter too."""
    found = [index for index, view in enumerate(seen) if view is not None]
    if len(found) == 2:
        long = [view.num_long_axes for view in seen]
        if long[0] == long[1]:
            return None
        return int(long[1] > long[0])
    return found[0]


def _bind(equation, inputs):
    """The results of an equation, as jax would run it."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = ((), params) if isinstance(params, dict) else params  # before jax 0.10: functions apart
    results = equation.primitive.bind(*functions, *inputs, **params)
    return list(results) if equation.primitive.multiple_results else [results]
