"""Random numbers that belong to a record: a function of (seed, name, record index) and of nothing else.

So a record looks the same in every batch, order, process and on every machine. One SplitMix64 generator per
record, all of a batch at once; integer arithmetic only. NumPy's own generators would need one object per
record, and jax.random would put the input pipeline onto the accelerator that it feeds.
"""

import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def record_bits(seed: int, name: str, indices: np.ndarray, count: int) -> np.ndarray:
    """The first `count` random words of each record.

    Args:
        seed: Any integer; taken modulo 2**64.
        name: Which stream; two names give unrelated numbers.
        indices: Record numbers.
        count: Words per record; asking for more leaves the first ones as they are.

    Shapes:
        indices: int[N].
        return: uint64[N, count].

    Reference:
        Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", SplitMix64. Differs: each
        record's starting state is the mixed (seed, name, index) instead of a split of a parent.
    """
    stream = _mix(np.array([seed & (2**64 - 1)], np.uint64)) ^ np.uint64(zlib.crc32(name.encode()))
    start = _mix(_mix(stream) + np.asarray(indices).astype(np.uint64) * _GOLDEN)
    return _mix(start[:, None] + (np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)[None, :])


def record_uniform(seed: int, name: str, indices: np.ndarray, count: int) -> np.ndarray:
    """float64[N, count] in [0, 1), from the upper 53 bits of `record_bits`."""
    return (record_bits(seed, name, indices, count) >> np.uint64(11)) * 2.0**-53


def record_normal(seed: int, name: str, indices: np.ndarray, count: int) -> np.ndarray:
    """float32[N, count] with mean 0 and variance 1: the sum of four 16-bit uniforms.

    Close to Gaussian but never beyond 3.47; pixel noise is clipped anyway, and without a logarithm the bits
    are the same on every machine.
    """
    quarters = record_bits(seed, name, indices, count).view(np.uint16).reshape(len(indices), count, 4)
    total = quarters.sum(axis=2, dtype=np.uint32).astype(np.float32)
    # Four uniforms on 0 … 65535: mean 2 * 65535, variance 4 * (65536**2 - 1) / 12.
    return (total - np.float32(131070.0)) * np.float32((3.0 / (65536.0**2 - 1.0)) ** 0.5)


def _mix(words):
    """The SplitMix64 finaliser; wraps modulo 2**64, which NumPy does silently on arrays."""
    for shift, multiplier in _MULTIPLIERS:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(multiplier)
    return words ^ (words >> np.uint64(31))
