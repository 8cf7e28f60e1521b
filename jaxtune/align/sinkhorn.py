"""Entropic assignment and transport in the log domain, where small temperatures do no harm."""

import jax
import jax.numpy as jnp


def sinkhorn(
    logits: jax.Array, *, num_iterations: int, rows: jax.Array | None = None, columns: jax.Array | None = None
) -> jax.Array:
    """The matrix `diag(u) exp(logits) diag(v)` with given sums of rows and columns.

    Rows are scaled first and columns last, so sums of columns are exact and those of rows as far as it has converged.

    Args:
        logits: Scores over the temperature; higher is likelier.
        num_iterations: Of rows and columns in turn.
        rows, columns: Wanted sums, positive and of one total; None: ones (then the result is doubly stochastic).

    Shapes:
        logits: float[..., m, n]; rows: float[m]; columns: float[n]; result: float[..., m, n].

    Reference:
        Cuturi 2013, arXiv:1306.0895; for permutations Mena et al. 2018, arXiv:1802.08665. Iterates on logarithms.
    """
    log_rows = jnp.zeros(logits.shape[-2:-1], logits.dtype) if rows is None else jnp.log(rows)
    log_columns = jnp.zeros(logits.shape[-1:], logits.dtype) if columns is None else jnp.log(columns)
    lead = (1,) * (logits.ndim - 2)
    log_rows = log_rows.reshape(*lead, -1, 1)
    log_columns = log_columns.reshape(*lead, 1, -1)

    def step(logits, _):
        logits = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True) + log_rows
        logits = logits - jax.nn.logsumexp(logits, axis=-2, keepdims=True) + log_columns
        return logits, None

    return jnp.exp(jax.lax.scan(step, logits, length=num_iterations)[0])
