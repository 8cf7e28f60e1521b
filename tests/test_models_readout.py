"""The frozen read-out: fixed per class name, in every process."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import ConfigError
from jaxtune.models.readout import class_embeddings, normalise_features, read_out

NAMES = ["zero", "one", "crème brûlée", ""]


def test_unit_vectors_of_the_name_alone():
    together = class_embeddings(NAMES, 33)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    backwards = class_embeddings(NAMES[::-1], 33)[::-1]
    alone = np.concatenate([class_embeddings([name], 33) for name in NAMES])
    np.testing.assert_array_equal(together, backwards)
    np.testing.assert_array_equal(together, alone)


def test_every_process_gets_the_same_bits():
    code = (
        "import sys; from jaxtune.models.readout import class_embeddings as e; "
        f"sys.stdout.buffer.write(e({NAMES!r}, 33).tobytes())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": "5"})
    assert out.stdout == class_embeddings(NAMES, 33).tobytes()


def test_they_never_change():
    # Golden on purpose: saved bases depend on them, and NumPy freezes this stream of numbers.
    np.testing.assert_allclose(class_embeddings(["zero"], 3), [[0.564864, 0.822521, 0.066244]], atol=1e-6)


def test_directions_are_even():
    cosines = class_embeddings([f"class {n}" for n in range(300)], 64)
    products = cosines @ cosines.T
    products = products[~np.eye(300, dtype=bool)]
    # Random directions in 64 dimensions: mean 0, standard deviation 1 / 8.
    assert abs(products.mean()) < 0.01
    assert products.std() == pytest.approx(1 / 8, rel=0.05)


def test_edges():
    assert class_embeddings([], 4).shape == (0, 4)
    assert np.abs(class_embeddings(NAMES, 1)).tolist() == [[1.0]] * 4
    with pytest.raises(ConfigError, match="got 0"):
        class_embeddings(NAMES, 0)


def test_logits_are_scaled_cosines():
    features = np.random.default_rng(0).normal(size=(6, 33)).astype(np.float32) * 10
    embeddings = class_embeddings(NAMES, 33)
    want = [[3.0 * f @ e / np.sqrt(f @ f) for e in embeddings.astype(np.float64)] for f in features.astype(np.float64)]
    got = jax.jit(read_out)(features, embeddings, scale=3.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(read_out(features, embeddings), np.asarray(got) / 3 / 0.07, rtol=1e-4, atol=1e-4)
    assert read_out(jnp.asarray(features, jnp.bfloat16), embeddings).dtype == jnp.float32


def test_a_row_of_zeros_has_a_finite_gradient():
    zeros = jnp.zeros((2, 4))
    np.testing.assert_array_equal(normalise_features(zeros), zeros)
    gradient = jax.grad(lambda x: read_out(x, class_embeddings(NAMES, 4)).sum())(zeros)
    assert np.isfinite(gradient).all()
