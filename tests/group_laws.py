"""What makes a symmetry a group that acts, for any spec."""

import jax
import numpy as np

from jaxtune import symmetry


def check_group_laws(spec, params, *, rtol, atol):
    """Identity, composition, associativity, inverses, of random elements and of what they do to `params`."""

    def assert_close(a, b):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)

    a, b, c = (symmetry.random(jax.random.key(n), spec) for n in range(3))
    for element in (a, b, c):
        symmetry.check(spec, element)
        symmetry.check(spec, symmetry.invert(spec, element))
    assert_close(symmetry.apply(spec, symmetry.identity(spec), params), params)
    twice = symmetry.apply(spec, b, symmetry.apply(spec, a, params))
    assert_close(symmetry.apply(spec, symmetry.compose(spec, b, a), params), twice)
    left = symmetry.compose(spec, symmetry.compose(spec, c, b), a)
    assert_close(left, symmetry.compose(spec, c, symmetry.compose(spec, b, a)))
    inverse = symmetry.invert(spec, a)
    for pair in ((inverse, a), (a, inverse)):
        assert_close(symmetry.compose(spec, *pair), symmetry.identity(spec))
    assert_close(symmetry.apply(spec, inverse, symmetry.apply(spec, a, params)), params)
