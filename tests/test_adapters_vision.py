"""Adapters of vision transformers, whose modules transformers 5 calls otherwise than the files that it writes."""

import numpy as np
import pytest
from hub_models import MODELS, assert_close, make_model, randomise, write_folder
from peft_models import adapt, load_base, load_with_peft, write_adapted, write_tensors

from jaxtune import tree
from jaxtune.adapters import extract_adapter, merge_adapter, read_adapter, write_adapter
from jaxtune.adapters.binding import bind
from jaxtune.checkpoint import safetensors
from jaxtune.models import registry

pytest.importorskip("transformers")
pytest.importorskip("peft")
FAMILIES = pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])


def images(family):
    fields = MODELS[family][1]
    return np.random.RandomState(3).normal(size=(3, fields["image_size"], fields["image_size"], 3)).astype(np.float32)


def theirs(model, image):
    import torch

    with torch.no_grad():
        return model(pixel_values=torch.from_numpy(image.transpose(0, 3, 1, 2))).logits.numpy()


def ours(stored, params, image):
    config = registry.config_from_dict(stored.config) if stored.network is None else stored.network
    return np.asarray(registry.apply(config, params, {"image": image}))


def write_base(folder, family):
    return write_folder(folder / "base", make_model(family))


@FAMILIES
@pytest.mark.parametrize("words", ["network", "file"])
def test_what_peft_trained_is_merged(family, words, tmp_path):
    base = write_base(tmp_path, family)
    adapted = adapt(make_model(family), r=4, target_modules=["q_proj", "v_proj", "o_proj", "fc1", "fc2"])
    expected = theirs(adapted, images(family))
    folder = write_adapted(tmp_path / "adapter", adapted)
    if words == "file":  # as releases before it called them
        stored, table = load_base(base)
        own = read_adapter(folder)
        renamed = {}
        for matrix in bind(own, table, stored.params)[0]:
            module = matrix.name.removesuffix(".weight")
            renamed[f"base_model.model.{module}.lora_A.weight"] = own.tensors[matrix.low_rank.a]
            renamed[f"base_model.model.{module}.lora_B.weight"] = own.tensors[matrix.low_rank.b]
        write_tensors(folder, renamed)
        config = (folder / "adapter_config.json").read_text()
        for new, old in (("q_proj", "query"), ("v_proj", "value"), ("o_proj", "dense"), ("fc1", "fc1"), ("fc2", "fc2")):
            config = config.replace(f'"{new}"', f'"{old}"')
        (folder / "adapter_config.json").write_text(config)
    stored, table = load_base(base)
    merged = merge_adapter(read_adapter(folder), table, stored.params)
    assert_close(ours(stored, merged, images(family)), expected, 1e-5)
    assert np.abs(expected - theirs(make_model(family), images(family))).max() > 0.01


@FAMILIES
def test_peft_reads_what_is_extracted(family, tmp_path):
    base = write_base(tmp_path, family)
    stored, table = load_base(base)
    tuned, _ = load_base(write_folder(tmp_path / "tuned", randomise(make_model(family), 5)))
    vector = tree.task_vector(stored.params, tuned.params)
    matrices = tree.map_leaves(lambda path, leaf: leaf if path.endswith("kernel") else 0 * leaf, vector)
    found = extract_adapter(matrices, table, stored.params, rank=5, base=str(base))
    out = write_adapter(tmp_path / "out", found.adapter)
    names = safetensors.read_tensors(out / "adapter_model.safetensors")[1]
    assert any(".attention.q_proj." in name for name in names)
    merged = merge_adapter(read_adapter(out), table, stored.params)
    image = images(family)
    assert_close(ours(stored, merged, image), theirs(load_with_peft(base, out), image), 1e-4)
