"""The page on fine-tunes: its code runs."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "fine_tunes.md"


@pytest.fixture
def names():
    """What the page's reader has: two releases, a fine-tune, samples of its task and of another."""
    from jaxtune.data import open_source
    from jaxtune.models import mlp, registry
    from jaxtune.sampling import make_sample

    config = mlp.Config(image_shape=(28, 28, 1), widths=(6,), num_outputs=10)
    draw = np.random.default_rng(0)
    base = registry.init(jax.random.key(0), config)
    finetuned = jax.tree.map(lambda x: x + 0.01 * draw.normal(size=x.shape).astype(np.float32), base)
    sample = make_sample(config, open_source("digits", "validation"), num_examples=40)
    test = make_sample(config, open_source("digits", "test"), num_examples=40)
    return {"config": config, "base": base, "finetuned": finetuned, "sample": sample, "test": test, "next_base": base}


def test_its_code_runs(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "skill.safetensors").exists()
