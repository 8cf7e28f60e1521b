"""Pre-training and fine-tuning in one process: what they leave behind, and what they refuse."""

import csv
import json

import jax
import ml_collections
import numpy as np
import pytest
from config_files import CONFIGS, read_module

from experiments import barrier, few, merge, soups, versions
from experiments.finetune import HALF_FIELDS, LORA_FIELDS, finetune
from experiments.fitting import FIELDS, OPTIONAL, check_fields
from experiments.pretrain import pretrain
from experiments.sources import open_splits
from jaxtune import tree
from jaxtune.align.registry import METHODS as ALIGN
from jaxtune.checkpoint import hash_checkpoint, load, save
from jaxtune.compose.registry import METHODS as COMPOSE
from jaxtune.data import open_source
from jaxtune.errors import CheckpointError, ConfigError, UnknownNameError
from jaxtune.evaluate.classifier import evaluate_classifier
from jaxtune.merge.registry import METHODS as MERGE
from jaxtune.models import registry
from jaxtune.models.readout import class_embeddings
from jaxtune.train.adapter import load_adapter
from jaxtune.train.lora import merge_lora
from jaxtune.train.optimizer import make_optimizer, make_schedule
from jaxtune.transport.registry import METHODS as TRANSPORT

DIGITS = {"name": "digits", "options": {"size": 16}, "eval_options": {}, "classes": (), "shifts": ()}
SIZES = {"image_size": 16, "patch_size": 8, "channels": 1, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24}
MLP = {"model_type": "jaxtune_mlp", "image_shape": (16, 16, 1), "widths": (16,), "num_outputs": 10}
SHORT = {
    "data": {**DIGITS, "options": {"size": 16, "margin": 1}},
    "batch_size": 32,
    "num_steps": 30,
    "learning_rate": 0.01,
    "schedule": {"num_warmup_steps": 3},
    "log_every": 10,
    "evaluate_every": 20,
    "save_every": 20,
    "eval_batch_size": 100,
}


def read_config(name, **changes):
    """A config file's own config, made small."""
    module = read_module(name)
    config = module.get_config().to_dict() | SHORT | changes
    return ml_collections.ConfigDict(config), module


def pretrain_config(**changes):
    vit = {"model_type": "jaxtune_vit", **SIZES, "num_outputs": 32}
    return read_config("pretrain_glyphs", **{"model": vit, **changes})[0]


def finetune_config(base, **changes):
    lora = read_config("finetune_digits")[0].lora.to_dict() | changes.pop("lora", {})
    return read_config("finetune_digits", base=str(base), lora=lora, **changes)[0]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a finished run."""
    path = tmp_path_factory.mktemp("pretrained")
    assert pretrain(pretrain_config(), path, ["--config.num_steps=30"]) is None
    return path


@pytest.fixture(scope="module")
def adapted(pretrained, tmp_path_factory):
    """The folder of a finished LoRA run with a merged model, and its config."""
    path = tmp_path_factory.mktemp("adapted")
    config = finetune_config(pretrained / "model", lora={"rank": 2})
    assert finetune(config, path) is None
    return path, config


def leaves_of(folder):
    return tree.flatten(load(folder).params)


def test_a_run_leaves_a_model_its_numbers_and_its_origin(pretrained, capsys):
    result = json.loads((pretrained / "metrics.json").read_text())
    assert result["num_steps"] == 30
    assert result["test"]["num_examples"] == len(open_source("digits", "test"))
    manifest = json.loads((pretrained / "manifest.json").read_text())
    assert manifest["config"]["model"]["width"] == 16
    assert manifest["overrides"] == ["--config.num_steps=30"]
    assert manifest["seeds"] == {"seed": 0}
    assert sorted(path.name for path in (pretrained / "model").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert list(pretrained.glob("events.out.tfevents.*"))
    with (pretrained / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == [10, 20, 30]
    assert [step for step, row in rows.items() if row["validation_accuracy"]] == [20, 30]
    assert float(rows[30]["validation_accuracy"]) == result["validation"]["accuracy"]


def test_the_published_model_has_the_published_accuracy(pretrained):
    base = load(pretrained / "model")
    config = registry.config_from_dict(base.config)
    source = open_source("digits", "test", **SHORT["data"]["options"])
    metrics = evaluate_classifier(config, base.params, source, embeddings=class_embeddings(source.class_names, 32))
    result = json.loads((pretrained / "metrics.json").read_text())["test"]
    assert metrics.accuracy == result["accuracy"]
    assert metrics.accuracy > 0.3  # ten classes, thirty steps
    np.testing.assert_allclose(metrics.loss, result["loss"], rtol=1e-5)


def test_a_finished_run_is_not_run_again(pretrained, capsys):
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    assert pretrain(pretrain_config(), pretrained) is None
    assert "test: accuracy" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before


def test_the_seed_decides_everything(tmp_path):
    models = []
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        pretrain(pretrain_config(model=MLP, seed=seed), tmp_path / name)
        models.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    assert models[0] != models[2]


def test_another_config_in_the_same_folder_is_refused(pretrained):
    with pytest.raises(ConfigError, match=r"config\.optimizer\.weight_decay: began with 0\.05, now 0\.2"):
        pretrain(pretrain_config(optimizer={"weight_decay": 0.2}), pretrained)


def test_a_mistake_can_be_mended_in_the_same_folder(tmp_path):
    with pytest.raises(ConfigError, match="log_every"):
        pretrain(pretrain_config(model=MLP, log_every=0), tmp_path)
    assert pretrain(pretrain_config(model=MLP, num_steps=4), tmp_path) is None
    assert json.loads((tmp_path / "manifest.json").read_text())["config"]["num_steps"] == 4


def test_fine_tuning_all_weights_beats_its_base(pretrained, tmp_path):
    base = load(pretrained / "model")
    finetune(finetune_config(pretrained / "model"), tmp_path)
    before = json.loads((pretrained / "metrics.json").read_text())["test"]["loss"]
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["test"]["loss"] < 0.8 * before
    assert result["num_trained_parameters"] == result["num_parameters"]
    assert load(tmp_path / "model").config == base.config
    assert not (tmp_path / "adapter").exists()
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["parents"]["base"]["sha256"] == hash_checkpoint(base)


def test_an_adapter_on_its_base_is_the_merged_model_bit_for_bit(pretrained, adapted):
    path, _ = adapted
    factors, config = load_adapter(path / "adapter")
    base = load(pretrained / "model")
    assert config["base_sha256"] == hash_checkpoint(base)
    assert config["scale"] == 8.0 / 2
    merged = tree.flatten(jax.tree.map(np.asarray, merge_lora(base.params, factors, scale=config["scale"])))
    written = leaves_of(path / "model")
    assert merged.keys() == written.keys()
    for name in merged:
        np.testing.assert_array_equal(merged[name], written[name], err_msg=name)
    changed = {
        name for name, leaf in written.items() if not np.array_equal(leaf, leaves_of(pretrained / "model")[name])
    }
    assert changed == {name.rpartition("/")[0] for name in tree.flatten(factors)}


def test_an_adapter_helps_and_is_small(pretrained, adapted):
    result = json.loads((adapted[0] / "metrics.json").read_text())
    before = json.loads((pretrained / "metrics.json").read_text())
    assert result["test"]["loss"] < 0.9 * before["test"]["loss"]
    assert result["num_trained_parameters"] == 2 * (4 * (16 + 16) + 2 * (16 + 24))
    assert result["num_parameters"] == before["num_parameters"]


def test_a_folder_that_is_no_adapter_is_refused(pretrained, adapted, tmp_path):
    with pytest.raises(CheckpointError, match=r"Name the folder that holds adapter\.safetensors"):
        load_adapter(pretrained / "model")
    foreign = json.loads((adapted[0] / "adapter" / "adapter_config.json").read_text()) | {"peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(foreign))
    with pytest.raises(CheckpointError, match="not an adapter of ours"):
        load_adapter(tmp_path)


def test_an_adapter_alone_without_merge(pretrained, tmp_path):
    config = finetune_config(pretrained / "model", lora={"rank": 1, "merge": False}, num_steps=4)
    finetune(config, tmp_path)
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()
    assert not (tmp_path / "model").exists()


def test_a_base_that_changed_meanwhile_is_refused(pretrained, adapted, tmp_path):
    path, config = adapted
    base = load(pretrained / "model")
    other = tmp_path / "model"
    save(other, jax.tree.map(lambda leaf: leaf + 1, base.params), config=base.config)
    with (path / "manifest.json").open() as file:
        manifest = json.load(file)
    manifest["config"]["base"] = str(other)
    copy = tmp_path / "run"
    (copy / "checkpoints" / "20").mkdir(parents=True)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    config = config.copy_and_resolve_references()
    config.base = str(other)
    with pytest.raises(ConfigError, match=r"parents.base.sha256.model.safetensors: began"):
        finetune(config, copy)


def test_a_bfloat16_base_stays_bfloat16_and_is_trained_in_float32(pretrained, tmp_path):
    base = load(pretrained / "model")
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jax.numpy.bfloat16), base.params)
    save(tmp_path / "base", half, config=base.config)
    # Steps of 1e-4 are far below the spacing of bfloat16 around 1.
    finetune(finetune_config(tmp_path / "base", learning_rate=1e-4), tmp_path / "run")
    written = leaves_of(tmp_path / "run" / "model")
    assert {leaf.dtype.name for leaf in written.values()} == {"bfloat16"}
    assert any(not np.array_equal(written[name], leaf) for name, leaf in tree.flatten(half).items())


def test_plain_logits_need_one_output_per_class(pretrained, tmp_path):
    with pytest.raises(ConfigError, match="32 outputs and digits has 10 classes"):
        finetune(finetune_config(pretrained / "model", frozen_read_out=False), tmp_path)
    assert pretrain(pretrain_config(model=MLP, frozen_read_out=False, num_steps=4), tmp_path / "mlp") is None


def test_lora_beside_batch_statistics_is_refused(tmp_path):
    config = registry.config_from_dict({"model_type": "jaxtune_resnet", "depth": 8, "channels": 1, "num_outputs": 10})
    shapes = jax.eval_shape(lambda key: registry.init(key, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    save(tmp_path / "base", params, config=registry.config_to_dict(config))
    with pytest.raises(ConfigError, match="running statistics"):
        finetune(finetune_config(tmp_path / "base", lora={"rank": 2}), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"base": None}, ConfigError, "--config.base=DIR"),
        ({"base": "/no/such/folder"}, CheckpointError, "no such file or folder"),
        ({"data": {**DIGITS, "shifts": ({"name": "rotat", "options": {}},)}}, UnknownNameError, "'rotate'"),
        ({"data": {**DIGITS, "shifts": ({"name": "rotate", "options": {"angle": 3}},)}}, UnknownNameError, "degrees"),
        ({"data": {**DIGITS, "shifts": ("rotate",)}}, ConfigError, "each shift is a dict"),
        ({"data": {**DIGITS, "classes": ("ten",)}}, UnknownNameError, "'ten'"),
        ({"data": {**DIGITS, "name": "digit"}}, UnknownNameError, "digits"),
        ({"optimizer": {"momentun": 0.9}}, UnknownNameError, "momentum"),
        ({"schedule": {"warmup": 3}}, UnknownNameError, "num_warmup_steps"),
        ({"log_every": 0}, ConfigError, "log_every is 0"),
        ({"batch_size": 31}, ConfigError, "31 cannot be shared equally by 2 devices"),
        ({"learning_rat": 3}, ConfigError, "learning_rat: no such field"),
        ({"lora": {"rank": 99}}, ConfigError, "takes 1 to 16"),
        ({"lora": {"rank": 2, "patterns": ("*/mpl/*",)}}, ConfigError, "matches no leaf"),
    ],
)
def test_a_users_mistake_is_named(pretrained, tmp_path, changes, error, words):
    config = finetune_config(pretrained / "model", **{k: v for k, v in changes.items() if k != "base"})
    if "base" in changes:
        config.base = changes["base"]
    with pytest.raises(error, match=words):
        finetune(config, tmp_path)


def test_missing_fields_are_listed():
    config = pretrain_config()
    del config.num_steps
    del config.data.shifts
    with pytest.raises(ConfigError, match=r"2 fields:\n  data.shifts: missing\n  num_steps: missing"):
        check_fields(config, (*FIELDS, "model"))


def test_shifts_and_classes_reach_every_split():
    data = {
        **DIGITS,
        "classes": ("3", "7"),
        "shifts": ({"name": "rotate", "options": {"degrees": 180}}, {"name": "invert"}),
    }
    for split, source in open_splits(ml_collections.ConfigDict(data)).items():
        plain = open_source("digits", split, size=16)
        batch = plain.__getitems__(np.arange(len(plain)))
        kept = np.flatnonzero(np.isin(batch["label"], [3, 7]))
        assert len(source) == len(kept)
        found = source.__getitems__(np.arange(5))
        np.testing.assert_array_equal(found["image"], 1 - batch["image"][kept[:5], ::-1, ::-1])
        assert source.class_names == plain.class_names


def test_eval_options_are_for_validation_and_test():
    data = {**DIGITS, "name": "glyphs", "options": {"num_records": 70}, "eval_options": {"num_records": 30}}
    splits = open_splits(ml_collections.ConfigDict(data))
    assert {split: len(source) for split, source in splits.items()} == {"train": 70, "validation": 30, "test": 30}


# What trains one network; the other configs have mains of their own, and the ladder's a test too: tests/test_ladder.py.
TRAINED = sorted(
    path.stem for path in CONFIGS.glob("*.py") if path.stem.startswith(("pretrain", "release", "finetune"))
)
MAINS = {"barrier": barrier, "few": few, "merge_glyphs": merge, "merge_intents": merge, "soups": soups}
MAINS |= {"polish": few, "versions": versions}


def test_every_config_has_a_test_of_its_fields():
    ladders = {"ladder", "ladder_small"}
    assert {path.stem for path in CONFIGS.glob("*.py")} == {*TRAINED, *MAINS, *ladders}


@pytest.mark.parametrize("name", MAINS)
def test_a_config_has_the_fields_of_its_main_and_networks_that_exist(name):
    _, module = read_config(name)
    config = module.get_config().lock()
    check_fields(config, MAINS[name].FIELDS)
    values = config.to_dict()
    json.dumps(values)
    networks = [values["model"]] if "model" in values else list(values.get("models", {}).values())
    networks += [row["model"] for kind in ("vision", "language") for row in values.get(kind, {}).values()]
    assert networks
    for network in networks:
        registry.config_from_dict(network)
    known = {**ALIGN, **MERGE, **COMPOSE, **TRANSPORT}
    for table in ("methods", "composed", "soups", "alignments", "ways"):
        for row in values.get(table, {}).values():
            options = set(row.get("options", {})) if row.get("way") not in ("distil", "tune") else set()
            assert "method" not in row or options <= set(known[row["method"]].options), row


@pytest.mark.parametrize("name", TRAINED)
def test_every_config_and_every_point_of_its_sweep_is_valid(name):
    _, module = read_config(name)
    for overrides in [{}, *getattr(module, "get_sweep", list)()]:
        config = module.get_config().lock()
        config.update_from_flattened_dict(overrides)
        if "model" in config:
            check_fields(config, (*FIELDS, "model"), optional=OPTIONAL)
            registry.config_from_dict(config.model.to_dict())
        else:
            check_fields(config, (*FIELDS, "base", *LORA_FIELDS), optional=(*OPTIONAL, *HALF_FIELDS))
        make_optimizer(make_schedule(config.learning_rate, config.num_steps, **config.schedule), **config.optimizer)
        json.dumps(config.to_dict())
