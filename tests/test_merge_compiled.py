"""Every merge method as an engine on a device has it: numbers of the leaf are arguments, constants are compiled in."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxtune.stream.device  # noqa: F401  which makes ranks and streams arguments of compiled functions
from jaxtune.merge.arrays import ArrayView
from jaxtune.merge.method import REQUIRED
from jaxtune.merge.options import check_options
from jaxtune.merge.registry import METHODS
from jaxtune.merge.view import Combine, Elements, weaken

GIVEN = {"task": 0}  # others: one half


@functools.partial(jax.jit, static_argnames=("function", "constants"))
def combine(models, base, streams, numbers, *, function, constants):
    return Combine(function, numbers, constants)(Elements(jnp, models, base, np.int64(0), streams))


@pytest.mark.parametrize("shape", [(16, 12), (5,)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.data == "none"])
def test_numbers_of_a_leaf_are_arguments(name, dtype, shape):
    method, draw = METHODS[name], np.random.default_rng(0)
    count = min(max(method.num_models[0], 3), method.num_models[1] or 3)
    base = draw.standard_normal(shape).astype(dtype)
    models = [(base.astype(np.float32) + 0.3 * draw.standard_normal(shape)).astype(dtype) for _ in range(count)]
    given = {option: GIVEN.get(option, 0.5) for option, value in method.options.items() if value is REQUIRED}
    options = check_options(method, given, count, has_base=method.base != "none")
    bases = [None if method.base == "none" else base]
    view = ArrayView(["layers.0.q.weight"], [models], bases, unit=method.unit_of(options), input_axis=-1)
    made, whole = method.prepare(view, options), view.whole(0)
    hash(made.constants)  # what is compiled in is a key
    with jax.enable_x64(True):
        placed = tuple(map(jnp.asarray, whole.models)), None if whole.base is None else jnp.asarray(whole.base)
        found = combine(
            *placed, whole.streams, weaken(made.numbers, whole), function=made.function, constants=made.constants
        )
    assert found.dtype == whole.dtype
    # float32 against float64 where spectra are involved; both are rounded to eight bits after.
    tolerance = 1e-12 if dtype == np.float32 else 2e-5
    if method.unit_of(options) == "leaf":
        tolerance = max(tolerance, 1e-8)
    np.testing.assert_allclose(np.asarray(found), made(whole), rtol=tolerance, atol=tolerance)
