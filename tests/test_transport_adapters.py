"""`jaxtune transport` with adapters: in as LoRA and out as LoRA, merged, or cut out of full weights anew."""

import json

import numpy as np
import pytest
from hub_models import make_model, write_folder
from test_hub_recovery import draw_inputs, move

import jaxtune as jt
from jaxtune import cli, symmetry
from jaxtune.loading import load, network_of
from jaxtune.models import registry
from jaxtune.rng import named_key

peft = pytest.importorskip("peft")
# Of peft on a transformers newer than it: not about us.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama, a LoRA of it, the same Llama moved by a random element, and the LoRA merged."""
    import jax
    import torch

    root = tmp_path_factory.mktemp("adapters")
    model = make_model("llama")
    inputs = draw_inputs(model)
    old = write_folder(root / "old", model)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, leaf in adapted.named_parameters():
            if "lora" in name:
                leaf.copy_(0.2 * torch.randn(leaf.shape, generator=generator))
        expected = adapted(**inputs).logits.numpy()
    adapted.save_pretrained(root / "lora")
    write_folder(root / "merged", adapted.merge_and_unload())
    spec = registry.symmetry_of(network_of(load(old)))
    move(old, root / "new", symmetry.random(named_key(jax.random.key(0), "planted"), spec), spec)
    return root, inputs, expected


def run(folders, out, *arguments, finetuned="lora"):
    root = folders[0]
    paths = ["--source", root / "old", "--finetuned", root / finetuned, "--target", root / "new", "--out", out]
    return cli.main(["transport", *map(str, paths), *arguments])


def outputs_of(base, adapter, inputs):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def assert_carried(outputs, folders, tolerance=1e-3):
    assert np.abs(outputs - folders[2]).max() < tolerance * np.sqrt(np.mean(folders[2] ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "permutation", "full"])
def test_an_adapter_arrives_as_an_adapter_of_the_same_rank(method, folders, tmp_path, capsys):
    assert run(folders, tmp_path / "out", f"--method={method}") == 0, capsys.readouterr().err
    assert "factors moved one by one" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(folders[0] / "new"))
    assert_carried(outputs_of(folders[0] / "new", tmp_path / "out", folders[1]), folders)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["inputs"]["finetuned"]["sha256"]) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list((tmp_path / "out").glob("model*"))


@pytest.mark.slow
def test_an_adapter_is_merged_on_request(folders, tmp_path):
    assert run(folders, tmp_path / "out", "--as=full") == 0
    assert_carried(outputs_of(tmp_path / "out", None, folders[1]), folders)


@pytest.mark.slow
def test_full_weights_leave_as_an_adapter_with_the_error_stated(folders, tmp_path, capsys):
    assert run(folders, tmp_path / "exact", "--rank=3", finetuned="merged") == 0
    assert_carried(outputs_of(folders[0] / "new", tmp_path / "exact", folders[1]), folders)
    assert run(folders, tmp_path / "rough", "--rank=1", finetuned="merged") == 0
    assert "left out by the factors" in capsys.readouterr().out
    errors = [json.loads((tmp_path / name / "report.json").read_text())["adapter"] for name in ("exact", "rough")]
    assert errors[0]["total_error"] < 1e-3 < 0.1 < errors[1]["total_error"] < 1


@pytest.mark.slow
def test_python_takes_an_adapter_where_a_fine_tune_is_asked_for(folders):
    root = folders[0]
    ours = jt.transport(root / "old", root / "lora", root / "new", method="permutation").params
    theirs = jt.transport(root / "old", root / "merged", root / "new", method="permutation").params
    for path, leaf in jt.tree.flatten(theirs).items():
        np.testing.assert_allclose(jt.tree.flatten(ours)[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("arguments", "finetuned", "words"),
    [
        (["--as=lora"], "merged", "--rank R"),
        (["--as=full", "--rank=2"], "lora", "full weights have no rank"),
        (["--rank=0"], "merged", "rank is 0"),
        (["--method=orthogonal_shift"], "lora", "does more to a change than move it"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(arguments, finetuned, words, folders, tmp_path, capsys):
    assert run(folders, tmp_path / "out", "--no-verify", *arguments, finetuned=finetuned) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
