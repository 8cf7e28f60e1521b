"""Merges from files under options that ask a leaf for thresholds, norms and draws: the bits of arrays in memory."""

import ml_dtypes
import numpy as np
import pytest
from test_stream_run import assert_equal, count_of, expect, make_jobs, merge, write_models

from jaxtune.stream import engine
from jaxtune.stream.device import DeviceMerge

CASES = [
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "scope": "model"}),
    ("ties", {"density": 0.3, "rescale": "linf"}),
    ("ties", {"preset": "peft", "density": 0.4}),
    ("ties", {"preset": "paper"}),
    ("ties", {"preset": "fusionbench"}),
    ("dare_linear", {"density": 0.5}),
    ("dare_ties", {"density": 0.5, "rescale": "l2"}),
    ("dare_ties", {"density": 0.5, "rescale": "linf"}),
    ("della", {"density": 0.5}),
    ("della_linear", {"density": 0.5, "rescale": "keep"}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}),
    ("sce", {"select_topk": 0.3}),
    ("ram", {"epsilon": 0.05}),
    ("ramplus_tl", {"epsilon": 0.05}),
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("model_stock", {"filter_wise": True}),
    ("linear", {"weight": (0.3, 0.3, 0.1)}),
]
names = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=names)
def test_files_give_the_bits_of_arrays(name, options, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "BLOCK", 100)
    monkeypatch.setattr(engine, "SPAN", 700)
    models = write_models(tmp_path, count_of(name), dtype)
    found = merge(make_jobs(name, models, seed=3, **options), tmp_path / "work", num_workers=3)
    assert_equal(found, expect(name, models, seed=3, **options))


@pytest.mark.parametrize(("name", "options"), CASES, ids=names)
def test_devices_give_the_numbers_of_the_host(name, options, tmp_path):
    models = write_models(tmp_path, count_of(name))
    found = merge(make_jobs(name, models, seed=3, **options), tmp_path / "work", merge_span=DeviceMerge(run=512))
    for tensor, leaf in expect(name, models, seed=3, **options).items():
        np.testing.assert_allclose(found[tensor], leaf, rtol=3e-7, atol=1e-6, err_msg=tensor)
