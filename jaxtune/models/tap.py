"""What goes into and comes out of every matrix of a network, found by reading the program that computes it.

No family says where its matrices are: the jaxpr of `registry.apply` is run operation by operation, parameters are
followed through casts, reshapes and transposes, and every product of one with something else is a site.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import tree
from jaxtune.models import registry
from jaxtune.models.interpreter import Site, Tap
from jaxtune.models.views import view_of_leaf
from jaxtune.types import Params


def record_matrices(config: Any, params: Params, batch: Mapping[str, Any]) -> dict[str, Site]:
    """Inputs and outputs of every matrix of a network on a batch. Jittable; the network is run once.

    Convolutions are matrices that read patches, [height, width, channel] as one axis. A leaf that is used more than
    once in the same way has the rows of all its uses, one use after the other; used in two ways, of the first. Left out
    are the experts of a mixture, which run inside a loop (the router and shared experts are there), grouped
    convolutions, and tables that are looked up and never multiplied.

    Args:
        config: Of any family of `models.registry`.
        params: Its parameters.
        batch: Inputs as `registry.apply` takes them, without labels.

    Returns:
        Path of the leaf -> `Site`, in the order of their use.

    Raises:
        TreeMismatchError, DataError: as `registry.apply`.
    """
    _, sites = _run(partial(registry.apply, config), params, batch, {})
    return sites


def record_gradients(
    config: Any, params: Params, batch: Mapping[str, Any], loss: Callable[[Any], jax.Array]
) -> dict[str, Site]:
    """The same, and the gradient of a loss with respect to the outputs of every matrix.

    Args:
        config, params, batch: As `record_matrices`.
        loss: Outputs of `registry.apply` -> float[].

    Returns:
        Path of the leaf -> `Site` with `gradients`, in the shape of its outputs.

    Raises:
        TreeMismatchError, DataError: as `registry.apply`.
    """
    return record_gradients_of(lambda params, batch: loss(registry.apply(config, params, batch)), params, batch)


def record_gradients_of(
    loss: Callable[[Params, Mapping[str, Any]], jax.Array], params: Params, batch: Mapping[str, Any]
) -> dict[str, Site]:
    """The same of a loss that asks the network itself: (params, batch) -> float[]."""
    shapes = jax.eval_shape(lambda: _run(loss, params, batch, {})[1])
    zeros = {path: jnp.zeros(site.outputs.shape, site.outputs.dtype) for path, site in shapes.items()}

    def run(pushed):
        value, sites = _run(loss, params, batch, pushed)
        return value, sites

    gradients, sites = jax.grad(run, has_aux=True)(zeros)
    return {path: replace(site, gradients=gradients[path]) for path, site in sites.items()}


def _run(function, params, batch, pushed):
    """(result, sites) of `function(params, batch)`, `pushed[path]` added to the outputs of the matrix at `path`."""
    leaves = tree.flatten(params)

    def program(leaves, batch):
        return function(tree.unflatten(leaves), batch)

    closed, shape = jax.make_jaxpr(program, return_shape=True)(leaves, dict(batch))
    flat, _ = jax.tree.flatten((leaves, dict(batch)))
    views = [view_of_leaf(path, jnp.shape(leaves[path])) for path in sorted(leaves)]  # as jax orders a dict
    views += [None] * (len(flat) - len(views))
    tap = Tap(pushed)
    outputs = tap.run(closed.jaxpr, closed.consts, flat, views)
    sites = {
        path: replace(_join(uses, _mask_of(path, uses[0], batch)), order=order)
        for order, (path, uses) in enumerate(tap.uses.items())
    }
    return jax.tree.unflatten(jax.tree.structure(shape), outputs), sites


def _join(uses, mask):
    """The uses of one leaf as one site; only those that read it as the first does."""
    uses = [use for use in uses if use.in_axes == uses[0].in_axes]
    if len(uses) == 1:
        return replace(uses[0], mask=mask)
    inputs, outputs = (jnp.concatenate([getattr(use, name) for use in uses]) for name in ("inputs", "outputs"))
    mask = None if mask is None else jnp.tile(mask, len(uses))
    return Site(inputs, outputs, uses[0].in_axes, mask, num_uses=len(uses))


def _mask_of(path, site, batch):
    """Which rows are real tokens: those of the text that the matrix reads."""
    reads_decoder = path.startswith("decoder/") and not path.endswith(("cross/k/kernel", "cross/v/kernel"))
    name = "decoder_mask" if "decoder_mask" in batch and reads_decoder else "mask"
    mask = batch.get(name)
    has_images = "image" in batch and not path.startswith("text/")
    if mask is None or has_images or jnp.size(mask) != len(site.inputs):
        return None
    return jnp.asarray(mask).reshape(-1).astype(bool)
