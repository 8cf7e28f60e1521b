"""The embedded checkpoints of the demo, and how they are trained anew.

Six small vision transformers in float16, read through the frozen class embeddings: an old base, a newer
release of it and a base from another seed, pretrained on drawn digits and letters; and each of them fine-tuned
on real handwritten digits. The two new bases' own fine-tunes are the ceiling that a transport can reach.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jaxtune import checkpoint
from jaxtune.checkpoint.output import make_layout
from jaxtune.checkpoint.publish import publish
from jaxtune.errors import ConfigError
from jaxtune.tree import map_leaves

# Name -> (experiment, config, overrides). "{old}" stands for the folder of the model called old.
RECIPES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "old": ("pretrain", "pretrain_glyphs", ("--config.seed=0",)),
    "release": ("finetune", "release_glyphs", ("--config.base={old}",)),
    "other": ("pretrain", "pretrain_glyphs", ("--config.seed=1",)),
    "old_tuned": ("finetune", "finetune_digits", ("--config.base={old}",)),
    "release_tuned": ("finetune", "finetune_digits", ("--config.base={release}",)),
    "other_tuned": ("finetune", "finetune_digits", ("--config.base={other}",)),
}
STORED_DTYPE = "float16"


def load_embedded() -> dict[str, checkpoint.Checkpoint]:
    """The checkpoints that ship with the package, by name."""
    with resources.as_file(resources.files("jaxtune").joinpath("assets", "demo")) as folder:
        return {name: checkpoint.load(folder / name) for name in RECIPES}


def train_from_scratch(workdir: Path) -> dict[str, checkpoint.Checkpoint]:
    """Trains all six with the project's own experiments; goes on where an earlier call stopped.

    Args:
        workdir: One folder per model inside; `workdir/embedded` gets the checkpoints as they are shipped.

    Raises:
        ConfigError: not run from a checkout, which is where experiments and configs are.
        subprocess.CalledProcessError: a training run failed; it has said why.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "experiments" / "pretrain.py").exists():
        raise ConfigError(
            "training from scratch runs the experiments of a checkout, and this is an installed package. "
            "Clone the repository and run `make demo` there, or use the embedded checkpoints (no --from-scratch)."
        )
    workdir = workdir.resolve()
    folders = {name: workdir / name / "model" for name in RECIPES}
    for name, (experiment, config, overrides) in RECIPES.items():
        if not folders[name].exists():
            print(f"training {name} ({experiment}, configs/{config}.py)", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", f"experiments.{experiment}", f"--config=configs/{config}.py"]
            command += [f"--workdir={workdir / name}", *(text.format_map(folders) for text in overrides)]
            subprocess.run(command, cwd=root, check=True, stdout=sys.stderr)
    shutil.rmtree(workdir / "embedded", ignore_errors=True)
    for name, folder in folders.items():
        trained = checkpoint.load(folder)
        half = map_leaves(lambda _, leaf: leaf.astype(STORED_DTYPE), trained.params)
        with publish(workdir / "embedded" / name) as staging:
            layout = make_layout(half, trained.config)
            checkpoint.write_checkpoint(staging, half, layout)
    return {name: checkpoint.load(workdir / "embedded" / name) for name in RECIPES}


def copy_models(models: Mapping[str, checkpoint.Checkpoint], folder: Path) -> None:
    """Writes the checkpoints side by side, so that the command line can be tried on them."""
    for name, model in models.items():
        target = folder / name
        target.mkdir(parents=True)
        checkpoint.write_checkpoint(target, model.params, model.layout)
