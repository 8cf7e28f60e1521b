"""ResNets of transformers, and of torchvision and timm: outputs, bytes, symmetries, refusals.

The oracle for the former is transformers itself, for the latter a plain torch module (`hub_resnets`).
"""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from hub_models import assert_close
from hub_vision import change, check_invariance, check_round_trip, check_skipped, to_torch
from small_models import run

import jaxtune as jt
from jaxtune import symmetry
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.loading import load
from jaxtune.models import registry, resnet_imagenet
from jaxtune.models.hub.resnet import ARCHITECTURES, STAGE_WIDTHS
from jaxtune.rng import named_key
from jaxtune.tree import flatten, map_leaves, unflatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hub_resnets  # noqa: E402 (needs torch)

SEEN = 1e-3
TINY = {"num_channels": 2, "embedding_size": 6, "hidden_sizes": [24, 32], "depths": [2, 2], "num_labels": 5}
BASIC = {**TINY, "layer_type": "basic"}
# Name -> class, fields of its config, which output is compared.
VARIANTS = {
    "bottleneck": ("ResNetForImageClassification", TINY, "logits"),
    "basic": ("ResNetForImageClassification", BASIC, "logits"),
    "basic_plain_shortcut": ("ResNetForImageClassification", {**BASIC, "embedding_size": 24}, "logits"),
    "downsampled_first": ("ResNetForImageClassification", {**TINY, "downsample_in_first_stage": True}, "logits"),
    "downsampled_in_bottleneck": ("ResNetForImageClassification", {**TINY, "downsample_in_bottleneck": True}, "logits"),
    "basic_downsampled": ("ResNetForImageClassification", {**BASIC, "downsample_in_bottleneck": True}, "logits"),
    "bare": ("ResNetModel", TINY, "pooler_output"),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)


def images(channels, *, side=37, size=3, seed=0):
    """Sides that no stride divides: padding on both sides and on one differ."""
    return np.random.default_rng(seed).normal(size=(size, side, side - 4, channels)).astype(np.float32)


def make(name, folder, *, bfloat16=False, seed=0):
    torch.set_num_threads(1)
    class_name, fields, _ = VARIANTS[name]
    model = getattr(transformers, class_name)(transformers.ResNetConfig(**fields))
    hub_resnets.randomise(model, seed)
    (model.to(torch.bfloat16) if bfloat16 else model).save_pretrained(folder)
    return model


def make_timm(folder, architecture, *, num_classes=5, channels=3, suffix=".bin", seed=0):
    """A folder as timm pushes one."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    block, depths, times = ARCHITECTURES[architecture]
    model = hub_resnets.ResNet(block, depths, num_classes=num_classes, times=times, channels=channels)
    hub_resnets.randomise(model, seed)
    if suffix == ".bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        save_file(model.state_dict(), folder / "model.safetensors")
    cut = {"architecture": architecture, "num_classes": num_classes, "num_features": 1, "global_pool": "avg"}
    cut["pretrained_cfg"] = {"tag": "a1_in1k", "input_size": [channels, 224, 224], "classifier": "fc"}
    (folder / "config.json").write_text(json.dumps(cut))
    return model


def outputs_of(stored, image):
    return np.asarray(run(stored.network, stored.params, {"image": image}))


@EVERY
def test_outputs_are_those_of_transformers(name, tmp_path):
    model = make(name, tmp_path)
    image = images(TINY["num_channels"])
    want = getattr(model(to_torch(image)), VARIANTS[name][2])
    assert_close(outputs_of(load(tmp_path), image), want.detach().numpy().reshape(len(image), -1))


@pytest.mark.parametrize(
    ("architecture", "suffix", "side"), [("resnet18", ".bin", 61), ("resnet50", ".safetensors", 33)]
)
def test_outputs_are_those_of_torchvision_and_timm(architecture, suffix, side, tmp_path):
    model = make_timm(tmp_path, architecture, suffix=suffix)
    image = images(3, side=side, size=2)
    with torch.no_grad():
        want = model(to_torch(image)).numpy()
    assert_close(outputs_of(load(tmp_path), image), want)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet34", "wide_resnet50_2", "resnet101"])
def test_outputs_of_the_larger_ones(architecture, tmp_path):
    model = make_timm(tmp_path, architecture, num_classes=0, channels=1)
    image = images(1, side=33, size=2)
    with torch.no_grad():
        want = model(to_torch(image)).numpy()
    assert_close(outputs_of(load(tmp_path), image), want)


DEEP = ("resnet101", "resnet152", "resnet200", "wide_resnet101_2")


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.slow] * (name in DEEP)) for name in ARCHITECTURES]
)
def test_names_are_those_of_the_published_files(architecture):
    block, depths, times = ARCHITECTURES[architecture]
    with torch.device("meta"):
        names = hub_resnets.ResNet(block, depths, times=times, num_classes=1000).state_dict()
    values = {"architecture": f"tv_{architecture}.tv_in1k", "num_classes": 1000}
    config, table = registry.read_stored(values, names)
    table.check(names)
    shapes = flatten(jax.eval_shape(lambda key: registry.init(key, config), jax.random.key(0)))
    for row in table.rows:
        tensor = names[row.stored]
        shape = tuple(
            tensor.permute(2, 3, 1, 0).shape
            if tensor.ndim == 4
            else tensor.t().shape
            if tensor.ndim == 2
            else tensor.shape
        )
        assert shape == shapes[row.paths].shape, row.stored
    published = {"resnet18": 11_689_512, "resnet50": 25_557_032, "resnet152": 60_192_808, "wide_resnet50_2": 68_883_240}
    learnt = sum(leaf.size for path, leaf in shapes.items() if registry.is_trainable(config, path))
    assert learnt == published.get(architecture, learnt)
    registry.symmetry_of(config)


@EVERY
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_tensor_comes_back_byte_for_byte(name, bfloat16, tmp_path):
    make(name, tmp_path, bfloat16=bfloat16)
    check_round_trip(tmp_path)


def test_a_timm_folder_with_a_pickle_comes_back_as_safetensors(tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "in"
    folder.mkdir()
    model = make_timm(folder, "resnet18", num_classes=3)
    stored = load(folder)
    written = load_file(jt.save(tmp_path / "out", stored.params, like=stored) / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())
    assert written["bn1.num_batches_tracked"] == 7
    assert stored.network.num_outputs == 3


def test_a_bare_torchvision_file_needs_two_fields(tmp_path):
    make_timm(tmp_path, "resnet18")
    (tmp_path / "config.json").unlink()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "resnet18-f37072fd.pth")
    stored = load(tmp_path / "resnet18-f37072fd.pth", config={"architecture": "resnet18", "num_classes": 5})
    assert stored.network.block == "basic"
    assert stored.params["head"]["kernel"].shape == (512, 5)


# --- symmetry


@EVERY
def test_a_random_element_changes_nothing_that_comes_out(name, tmp_path):
    make(name, tmp_path)
    stored = load(tmp_path)
    check_invariance(stored.network, stored.params, {"image": images(2)})


@pytest.mark.parametrize("name", ["basic_plain_shortcut", "bottleneck"])
def test_scales_of_channels_leave_the_function_alone(name, tmp_path):
    make(name, tmp_path)
    stored = load(tmp_path)
    spec = registry.symmetry_of(stored.network, scales="free")
    with jax.enable_x64(True):
        wide = map_leaves(lambda _, leaf: np.asarray(leaf, np.float64), stored.params)
        moved = symmetry.apply(spec, symmetry.random(jax.random.key(1), spec), wide)
        assert change(stored.network, wide, moved, {"image": images(2)}) < 1e-9
        lost = unflatten(flatten(moved) | {"stem_norm/bias": flatten(wide)["stem_norm/bias"]})
        assert change(stored.network, wide, lost, {"image": images(2)}) > SEEN


@pytest.fixture(scope="module")
def bottleneck(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bottleneck")
    make("bottleneck", folder)
    stored = load(folder)
    return stored.network, stored.params, {"image": images(2)}


@pytest.mark.parametrize(
    "path",
    [
        "stem_norm/mean",
        "stage_0_block_1/norm3/var",
        "stage_1_block_0/shortcut_norm/scale",
        "stage_1_block_0/shortcut_conv/kernel",
        "stage_0_block_0/norm2/bias",
        "head/kernel",
    ],
)
def test_what_stays_behind_is_seen(path, bottleneck):
    check_skipped(*bottleneck, path)


def test_an_order_of_one_block_s_stream_alone_is_seen(bottleneck):
    config, params, batch = bottleneck
    flat = flatten(params)
    moved = {path: np.roll(leaf, 1, axis=-1) for path, leaf in flat.items() if path.startswith("stage_0_block_1/norm3")}
    moved["stage_0_block_1/conv3/kernel"] = np.roll(flat["stage_0_block_1/conv3/kernel"], 1, axis=-1)
    assert change(config, params, unflatten(flat | moved), batch) > SEEN


def test_signs_are_seen(bottleneck):
    config, params, batch = bottleneck
    flat = flatten(params)
    signs = np.where(np.arange(flat["stem_norm/scale"].size) % 2, 1, -1).astype(np.float32)
    moved = {name: flat[name] * signs for name in ("stem_norm/scale", "stem_norm/bias")}
    for conv in ("conv1", "shortcut_conv"):
        path = f"stage_0_block_0/{conv}/kernel"
        moved[path] = flat[path] * signs[None, None, :, None]
    assert change(config, params, unflatten(flat | moved), batch) > SEEN


def test_the_stem_is_of_the_first_stage_where_its_shortcut_is_plain():
    config = resnet_imagenet.Config(
        num_outputs=3, block="basic", depths=(1, 1), widths=(8, 16), inner_widths=(8, 16), stem_width=8
    )
    assert "stem/channel" not in registry.symmetry_of(config).groups
    assert "stem/channel" in registry.symmetry_of(replace(config, stem_width=4)).groups
    assert "stem/channel" in registry.symmetry_of(replace(config, first_stride=2)).groups


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_a_planted_order_is_found_and_the_fine_tune_carried(name, tmp_path):
    """transformers runs the folder that is written: it computes what the fine-tune did."""
    draw = np.random.default_rng(3)
    tuned_model = make(name, tmp_path / "a")
    old = load(tmp_path / "a")
    tuned = map_leaves(lambda _, x: x + 0.02 * draw.normal(size=x.shape).astype(np.float32) * np.std(x), old.params)
    tuned = map_leaves(lambda path, x: np.abs(x) if path.endswith("var") else x, tuned)
    spec = registry.symmetry_of(old.network)
    new = symmetry.apply(spec, symmetry.random(named_key(jax.random.key(0), "planted"), spec), old.params)
    jt.save(tmp_path / "b", new, like=old)
    result = jt.transport(old, tuned, load(tmp_path / "b"), method="auto", config=old.network)
    jt.save(tmp_path / "out", result.params, like=load(tmp_path / "b"))
    again = type(tuned_model).from_pretrained(tmp_path / "out").eval()
    image = images(2)
    with torch.no_grad():
        got = again(to_torch(image)).logits.numpy()
    want = np.asarray(run(old.network, tuned, {"image": image}))
    assert_close(got, want)
    with torch.no_grad():
        assert np.abs(tuned_model(to_torch(image)).logits.numpy() - want).max() > 1e-2


# --- refusals


REFUSED = {
    "another class": ({"architectures": ["ResNetBackbone"]}, "ResNetBackbone"),
    "an activation": ({"hidden_act": "gelu"}, "\"hidden_act\" is 'gelu'"),
    "a layer": ({"layer_type": "inverted"}, "\"layer_type\" is 'inverted'"),
    "a flag of text": ({"downsample_in_first_stage": "yes"}, "downsample_in_first_stage"),
    "sizes": ({"hidden_sizes": [8]}, "must name the same stages"),
}
TIMM_REFUSED = {
    "a deep stem": ({"architecture": "resnet50d"}, "\"architecture\" is 'resnet50d'.*another stem"),
    "groups": ({"architecture": "resnet50_32x4d"}, "not supported; supported: resnet18"),
    "a pool": ({"global_pool": "avgmax"}, "\"global_pool\" is 'avgmax'"),
    "an argument": ({"model_args": {"output_stride": 16}}, '"model_args" sets output_stride'),
    "a pool as an argument": ({"model_args": {"global_pool": "max"}}, "\"global_pool\" is 'max'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_not_supported_are_named(name):
    fields, message = REFUSED[name]
    values = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], **TINY}
    registry.config_from_dict(values)
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict({**values, **fields})


@pytest.mark.parametrize("name", TIMM_REFUSED)
def test_timm_networks_that_are_not_supported_are_named(name):
    fields, message = TIMM_REFUSED[name]
    registry.config_from_dict({"architecture": "resnet50"})
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict({"architecture": "resnet50", **fields})


def test_arguments_of_timm_are_heard():
    config = registry.config_from_dict({"architecture": "resnet18", "model_args": {"in_chans": 1, "num_classes": 7}})
    assert (config.channels, config.num_outputs) == (1, 7)
    assert registry.config_from_dict({"architecture": "resnet18", "num_classes": 0}).head == "none"


def test_tensors_that_are_not_the_familys_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    make("basic", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "stranger": torch.ones(1)}, file)
    with pytest.raises(TreeMismatchError, match="stranger: in the file, not known"):
        load(tmp_path)
    gone = "resnet.embedder.embedder.normalization.running_var"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    with pytest.raises(TreeMismatchError, match=f"{gone}: expected, not in the file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change_of", "reason"),
    [
        ({"depths": (3, 4)}, "must name the same stages"),
        ({"block": "basic"}, "basic blocks are as wide inside as out"),
        ({"head": "none"}, "num_outputs is 2048"),
        ({"momentum": 1.0}, "below 1"),
        ({"first_stride": 3}, "one of 1, 2"),
    ],
)
def test_configs_that_make_no_sense(change_of, reason):
    with pytest.raises(ConfigError, match=reason):
        resnet_imagenet.Config(**{"num_outputs": 10} | change_of)


def test_defaults_are_those_of_transformers():
    full = json.loads(transformers.ResNetConfig().to_json_string(use_diff=False))
    head = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
    assert registry.config_from_dict(head) == registry.config_from_dict({**full, **head})
    assert sum(STAGE_WIDTHS) == 960
