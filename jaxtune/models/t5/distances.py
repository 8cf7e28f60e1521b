"""Relative positions: a distance between two tokens falls into a bucket, a bucket has a number for every head."""

import math

import numpy as np


def bucket_of(distance: np.ndarray, *, is_causal: bool, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of a distance: one each for short ones, wider and wider ones up to `max_distance`, one for the rest.

    Args:
        distance: Position of the key less position of the query.
        is_causal: Whether keys behind the query are never seen; else half of the buckets are theirs.
        num_buckets, max_distance: As in the config.

    Shapes:
        distance: int[...]; result: int32[...].

    Reference:
        Raffel et al. 2020, arXiv:1910.10683, and the released code, whose logarithm in float32 decides at the edges.
    """
    if is_causal:
        offset, far = 0, np.maximum(-distance, 0)
    else:
        num_buckets //= 2
        offset, far = num_buckets * (distance > 0), np.abs(distance)
    num_single = num_buckets // 2
    share = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(num_single))
    share = share / np.float32(math.log(max_distance / num_single)) * np.float32(num_buckets - num_single)
    wide = np.minimum(num_single + share.astype(np.int32), num_buckets - 1)
    return (offset + np.where(far < num_single, far, wide)).astype(np.int32)


def distances(num_queries: int, num_keys: int) -> np.ndarray:
    """Position of every key less position of every query: int32[queries, keys]."""
    return np.arange(num_keys, dtype=np.int32)[None, :] - np.arange(num_queries, dtype=np.int32)[:, None]
