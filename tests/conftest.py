"""Strict numerics for every test; two CPU devices, so that sharding is never a special case; one store of programs."""

import contextlib
import os
import shutil
import signal
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

# Started in the background of a script, a process ignores Ctrl-C and so do its children; tests send it on purpose.
with contextlib.suppress(ValueError):  # not the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Workers and the commands that tests start compile many a program that another has compiled already.
STORE, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
OWN_STORE = None if STORE in os.environ else tempfile.mkdtemp(prefix="jaxtune-tests-")
if OWN_STORE is not None:
    os.environ[STORE], os.environ[LEAST] = OWN_STORE, "0.3"  # for all that is started from here
jax.config.update("jax_compilation_cache_dir", os.environ[STORE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ.get(LEAST, 0.3)))


def pytest_unconfigure(config):
    del config
    if OWN_STORE is not None:  # the first process made it; workers have its name from there
        shutil.rmtree(OWN_STORE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """What one file compiled is let go behind it: kept, programs of the whole suite take six gigabytes a worker."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)
