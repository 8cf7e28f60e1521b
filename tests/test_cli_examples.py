"""`jaxtune transport --data`: what a few examples change, and what is said where they would change nothing."""

import gzip
import json

import jax
import numpy as np
import pytest

import jaxtune as jt
from jaxtune import tree
from jaxtune.cli import main
from jaxtune.commands.examples import hash_sample
from jaxtune.models import registry, vit
from jaxtune.sampling import make_sample
from jaxtune.teach.distill import distill
from jaxtune.teach.weights import whole_weights

CONFIG = vit.Config(
    image_size=16, patch_size=8, width=16, depth=2, num_heads=2, mlp_width=24, num_outputs=16, channels=1
)
DATA = ("--data", "digits", "--data-option", "size=16", "--samples", "24")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    init = jax.jit(registry.init, static_argnums=1)
    old, other = (jax.tree.map(np.asarray, init(jax.random.key(seed), CONFIG)) for seed in (0, 1))
    draw = np.random.default_rng(7)
    tuned = tree.map_leaves(lambda _, x: x + (0.2 * draw.normal(size=x.shape)).astype(np.float32), old)
    trees = {"source": old, "finetuned": tuned, "target": other}
    config = registry.config_to_dict(CONFIG)
    return {role: str(jt.save(folder / role, params, config=config)) for role, params in trees.items()}


@pytest.fixture
def run(capsys, models, tmp_path):
    """Runs a transport: (exit code, stdout, stderr, output folder)."""

    def run(*arguments):
        roles = [word for role, path in models.items() for word in (f"--{role}", path)]
        code = main(["transport", *roles, "--out", str(tmp_path / "out"), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, tmp_path / "out"

    return run


def divergence(params, models, sample):
    """Mean KL(fine-tune ‖ model) on a sample, by NumPy."""
    forward = jax.jit(sample.forward)
    ours, theirs = (
        np.asarray(jax.nn.log_softmax(forward(p, sample.batch)), np.float64)
        for p in (params, jt.load(models["finetuned"]).params)
    )
    return float(np.mean(np.sum(np.exp(theirs) * (theirs - ours), axis=-1)))


def test_data_alone_brings_the_result_nearer_to_the_fine_tune(run, models):
    code, out, err, folder = run(*DATA)
    assert code == 0, err
    assert "24 of digits, labels not learned from" in out
    assert "exp(-divergence) from the fine-tune on 20 examples held out in turn" in out
    assert "expected share" not in out  # that was drawn for transports without data
    report = json.loads((folder / "report.json").read_text())
    sample = make_sample(CONFIG, "digits", num_examples=24, size=16)
    assert report["examples"]["sha256"] == hash_sample(sample)
    free = jt.transport(*models.values(), method="auto", verify=False)
    carried = jt.load(folder).params
    assert divergence(carried, models, sample) < 0.8 * divergence(free.params, models, sample)
    # The task vector that is reported is what was written.
    change = tree.flatten(tree.task_vector(jt.load(models["target"]).params, carried))
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in change.values()))
    assert report["task_vector"]["norm"] == pytest.approx(norm, rel=1e-5)


def test_a_polish_is_the_mean_of_distillations_from_where_the_transport_ends(models):
    sample = make_sample(CONFIG, "digits", num_examples=24, size=16)
    polished = jt.transport(*models.values(), method="identity", sample=sample, polish="distill", scale=0.5)
    found = polished.prepared.info["polish"]
    start = jt.transport(*models.values(), method="identity", scale=0.5, verify=False).params
    base, teacher = (jt.load(models[role]).params for role in ("target", "finetuned"))
    key = jt.rng.named_key(jax.random.key(0), "polish")
    inputs = sample.without_labels()
    seed = int(jax.random.bits(jt.rng.named_key(key, "held out"), dtype=np.uint32))
    order = np.random.RandomState(seed).permutation(24)
    rates = tuple(rate / 3 for rate in whole_weights(start).rates)
    students = []
    for begin in (19, 14, 9, 4):  # five of 24 each
        held = np.sort(order[begin : begin + 5])
        rest = inputs.take(np.setdiff1d(np.arange(24), held))
        options = {"learning_rate": rates, "validation": inputs.take(held), "errors": 0.0}
        if students:
            info = students[0].info
            options = {"learning_rate": info["learning_rate"], "num_steps": info["step"], "schedule_steps": 150}
            options["held_out"] = 0.0
        students.append(distill(rest, teacher, start, key=key, base=base, **options))
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(student.params for student in students))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), dict(polished.params), expected)
    assert (found["verdict"], found["num_judges"]) == ("kept", 20)
    assert polished.expected is None
    assert polished.prepared.move is None


def test_the_same_command_gives_the_same_bytes(run):
    weights = []
    for _ in range(2):
        code, _, err, folder = run(*DATA, "--overwrite")
        assert code == 0, err
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--samples", 8), "--samples goes with --data"),
        (("--keep", "digits"), "--keep goes with --data"),
        (("--data-option", "size=16"), "--data-option goes with --data"),
        (("--polish", "distill"), "--polish distill needs unlabelled inputs: give --data"),
        (("--method", "gradfix"), "--method gradfix needs labelled examples: give --data"),
        ((*DATA, "--method", "identity"), "does not look at examples"),
        ((*DATA, "--method", "theseus", "--keep", "digits"), "--keep goes with a polish"),
        ((*DATA, "--data-option", "size"), "write it as NAME=VALUE"),
        ((*DATA, "--data-option", "sise=3"), "Did you mean 'size'"),
        (("--data", "digits"), "the model takes float[N, 16, 16, 1]"),
        (("--data", "nothing.npz"), "nothing.npz: cannot be opened"),
        (("--data", "digits", "--samples", 0), "num_examples is 0"),
    ],
)
def test_what_nothing_would_read_or_does_not_fit_is_refused(run, arguments, said):
    code, _, err, folder = run(*arguments)
    assert code == 2
    assert said in err
    assert not folder.exists()


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_images_without_labels_serve_methods_that_need_none(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16), np.uint8)
    path = write_npz(tmp_path / "plain.npz", train_x=images)
    code, out, err, _ = run("--data", path, "--method", "theseus")
    assert code == 0, err
    assert "plain.npz, no labels; outputs read as one a class" in out
    code, _, err, _ = run("--data", path, "--method", "gradfix", "--overwrite")
    assert code == 2
    assert "label" in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_x": np.zeros((0, 16, 16), np.uint8), "train_y": np.zeros(0, np.int32)}, "no records"),
        ({"train_y": np.full(12, 40)}, "labels run from 40 to 40"),
        ({"train_x": np.full((12, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"train_x": np.zeros((12, 20, 20), np.uint8)}, "the model takes float[N, 16, 16, 1]"),
    ],
)
def test_unusable_data_is_named(run, tmp_path, change, said):
    arrays = {
        "train_x": np.zeros((12, 16, 16), np.uint8),
        "train_y": np.arange(12) % 3,
        "test_x": np.zeros((3, 16, 16), np.uint8),
    }
    arrays |= {"test_y": np.arange(3), "class_names": np.array(["a", "b", "c"]), **change}
    code, _, err, folder = run("--data", write_npz(tmp_path / "odd.npz", **arrays))
    assert code == 2
    assert said in err
    assert "odd" in err
    assert not folder.exists()


def test_texts_polish_a_language_model_through_its_own_tokenizer(tmp_path, capsys):
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "far", "away"]
    for seed, role in enumerate(("source", "target")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / role)
        if role == "source":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            model.save_pretrained(tmp_path / "finetuned")
    vocabulary = {word: index + 2 for index, word in enumerate(words)} | {"[UNK]": 1, "[PAD]": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for role in ("source", "finetuned", "target"):
        tokenizer.save(str(tmp_path / role / "tokenizer.json"))
    draw = np.random.default_rng(0)
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt") as file:
        for _ in range(40):
            text = " ".join(draw.choice(words, 8))
            file.write(json.dumps({"task": "lm", "split": "train", "text": text}) + "\n")
    roles = [word for role in ("source", "finetuned", "target") for word in (f"--{role}", str(tmp_path / role))]
    code = main(
        [
            "transport",
            *roles,
            "--out",
            str(tmp_path / "out"),
            "--data",
            str(tmp_path / "texts.jsonl.gz"),
            "--samples",
            "32",
            "--scale",  # far enough off for a polish to bring something
            "0.1",
        ]
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["examples"]["num_examples"] == 32
    polish = report["info"]["polish"]
    assert polish["verdict"] == "kept"
    assert polish["likeness"][1] > polish["likeness"][0]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(torch.arange(2, 10)[None]).logits).all()
