"""Runs as processes: killed at any moment and started again, they give the bits of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict(dict(
        seed=3,
        data=dict(name="digits", options=dict(size=16), eval_options={{}}, classes=(), shifts=()),
        {start},
        frozen_read_out=True, batch_size=16, num_steps=600, learning_rate=0.01, schedule=dict(num_warmup_steps=10),
        optimizer=dict(weight_decay=0.01), label_smoothing=0.1, log_every=30, evaluate_every=300, save_every=100,
        num_kept=2, eval_batch_size=179,
    ))
"""
PRETRAIN = CONFIG.format(
    start="""model=dict(model_type="jaxtune_vit", image_size=16, patch_size=8, channels=1, width=8, depth=1,
                   num_heads=2, mlp_width=12, num_outputs=16)"""
)
FINETUNE = CONFIG.format(
    start="""base=BASE,
        lora=dict(rank=2, alpha=4.0, is_rank_stabilised=True, patterns=("*/attn/*/kernel",), merge=True)"""
)


def start(program, config, workdir, *arguments):
    command = [sys.executable, "-m", f"experiments.{program}", f"--config={config}", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def stop_after_a_checkpoint(process, workdir, number, delay):
    """Sends a signal `delay` seconds after the first checkpoint is there that was not there before."""
    before = set((workdir / "checkpoints").glob("*[0-9]"))
    deadline = time.monotonic() + 90
    while not set((workdir / "checkpoints").glob("*[0-9]")) - before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert not (workdir / "metrics.json").exists(), "too late: the run was finished"
    return process.returncode, err


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(config file, finished folder)."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "config.py").write_text(PRETRAIN)
    code, out, err = finish("pretrain", folder / "config.py", folder / "whole")
    assert code == 0, err
    assert "test: accuracy" in out
    return folder / "config.py", folder / "whole"


def assert_same_files(whole, resumed, *names):
    for name in names:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(pretrained, tmp_path):
    """SIGKILL at a random moment, Ctrl-C at another, then to the end."""
    config, whole = pretrained
    delay = random.Random(os.getpid()).uniform(0, 0.25)
    code, _ = stop_after_a_checkpoint(start("pretrain", config, tmp_path), tmp_path, signal.SIGKILL, delay)
    assert code == -signal.SIGKILL
    code, err = stop_after_a_checkpoint(start("pretrain", config, tmp_path), tmp_path, signal.SIGINT, delay)
    assert code == 128 + signal.SIGINT
    assert "The same command goes on" in err
    assert "Traceback" not in err
    code, _, err = finish("pretrain", config, tmp_path)
    assert code == 0, err
    assert_same_files(whole, tmp_path, "model/model.safetensors", "model/config.json", "metrics.csv")


@pytest.mark.slow
def test_a_killed_lora_run_goes_on_bit_for_bit(pretrained, tmp_path):
    _, base = pretrained
    config = tmp_path / "config.py"
    config.write_text(FINETUNE.replace("BASE", repr(str(base / "model"))))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, _, err = finish("finetune", config, whole)
    assert code == 0, err
    delay = random.Random(os.getpid()).uniform(0, 0.25)
    stop_after_a_checkpoint(start("finetune", config, broken), broken, signal.SIGKILL, delay)
    code, _, err = finish("finetune", config, broken)
    assert code == 0, err
    assert_same_files(whole, broken, "adapter/adapter.safetensors", "model/model.safetensors", "metrics.csv")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.sed=1"], "sed"),
        (["--config.seed=x"], "seed"),
        (["--wrkdir=x"], "Did you mean: workdir"),
        (["extra"], "'extra'"),
        (["--config.data.name=digit"], "Did you mean 'digits'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message_and_exit_2(tmp_path, arguments, words):
    config = tmp_path / "config.py"
    config.write_text(PRETRAIN)
    code, out, err = finish("pretrain", config, tmp_path / "run", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
