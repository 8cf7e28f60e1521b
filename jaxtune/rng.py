"""Random streams that are named, not counted: adding one never moves another."""

import zlib

import jax


def named_key(key: jax.Array, *names: str | int) -> jax.Array:
    """Derives the stream called `names` from `key`.

    Args:
        key: A key made by `jax.random.key`.
        *names: Words or numbers, folded in one after the other. `named_key(k, "a", 3)` is
            `named_key(named_key(k, "a"), 3)`.

    Returns:
        A key. The same names give the same key in every process: names enter by their crc32,
        since `hash(str)` differs from process to process.
    """
    for name in names:
        number = name & 0xFFFFFFFF if isinstance(name, int) else zlib.crc32(name.encode())
        key = jax.random.fold_in(key, number)
    return key
