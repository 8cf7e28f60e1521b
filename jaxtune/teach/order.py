"""The order in which a few examples are seen, whatever step one starts from."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.rng import named_key
from jaxtune.sample import Sample


class Order:
    """Which examples a step sees: every epoch in an order of its own, a function of the key and the step alone.

    Args:
        sample: The examples.
        batch_size: Examples a step; at most all of them.
        key: Of the orders.
    """

    def __init__(self, sample: Sample, batch_size: int, key: jax.Array):
        self._sample, self._size, self._key = sample, min(batch_size, len(sample)), key
        self._known: dict[int, np.ndarray] = {}

    def _permutation(self, epoch):
        if epoch not in self._known:
            seed = np.asarray(jax.random.bits(named_key(self._key, epoch), (2,), jnp.uint32))
            order = np.random.RandomState(seed).permutation(len(self._sample))
            self._known = {epoch: order, **dict(list(self._known.items())[:1])}
        return self._known[epoch]

    def batches(self, first: int, count: int) -> dict[str, np.ndarray]:
        """[count, batch size, ...] of each array."""
        places = first * self._size + np.arange(count * self._size)
        rows = [self._permutation(int(place) // len(self._sample))[place % len(self._sample)] for place in places]
        rows = np.reshape(rows, (count, self._size))
        return {name: values[rows] for name, values in self._sample.batch.items()}
