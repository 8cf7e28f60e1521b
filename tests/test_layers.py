"""The direction of imports: rooms above never import from rooms below."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxtune"

# Room -> rooms of ours it may import. A room may always import itself.
GROUND = ("types", "errors", "lazy", "tree", "rng", "sample", "gradients", "moments", "version")
MAY_IMPORT = {
    "types": (),
    "version": (),
    "errors": ("types",),
    "lazy": ("types",),
    "tree": ("types", "errors", "lazy"),
    "rng": ("types", "errors", "lazy", "tree"),
    "sample": ("types", "errors", "lazy", "tree", "rng"),
    "gradients": ("types", "errors", "lazy", "tree", "rng", "sample"),
    "moments": ("types", "errors", "lazy", "tree", "rng", "sample"),
    "symmetry": GROUND,
    "align": (*GROUND, "symmetry"),
    "merge": (*GROUND, "symmetry"),
    "interpolate": (*GROUND, "symmetry"),
    # Distillation is a transport too. Of `train` LoRA's factors, which know no model.
    "teach": (*GROUND, "symmetry", "align", "train"),
    "transport": (*GROUND, "symmetry", "align", "merge", "interpolate", "teach"),
    "models": (*GROUND, "symmetry"),
    "mesh": GROUND,
    "data": GROUND,
    "checkpoint": GROUND,
}
ALL_ABOVE = tuple(MAY_IMPORT)
for room in ("stream", "train", "evaluate"):
    MAY_IMPORT[room] = ALL_ABOVE
MAY_IMPORT["stream"] = (*ALL_ABOVE, "recipes")  # it does what the jobs of a resolved recipe say
# Learning on data which combination of models is best: the optimiser's room, beside `train`.
MAY_IMPORT["compose"] = (*ALL_ABOVE, "sampling", "train", "evaluate")
MAY_IMPORT["sampling"] = (*GROUND, "symmetry", "models", "data")  # where a task's records meet a network
for room in ("train", "evaluate"):
    MAY_IMPORT[room] = (*ALL_ABOVE, "sampling")
# Factors of a stored tensor (checkpoint) move as the leaves that its key table says (models, symmetry).
MAY_IMPORT["adapters"] = (*GROUND, "symmetry", "models", "checkpoint")
MAY_IMPORT["loading"] = (*GROUND, "symmetry", "models", "checkpoint", "transport")  # where the two meet
# What a recipe asks for of which stored tensors: planned from headers, so the room opens checkpoints and knows methods.
MAY_IMPORT["recipes"] = (*MAY_IMPORT["loading"], "loading", "adapters", "merge")
# Where examples decide what a recipe leaves open: models, what they say of examples, and ordinary recipes from then on.
MAY_IMPORT["deciding"] = (
    *ALL_ABOVE,
    "recipes",
    "stream",
    "sampling",
    "opening",
    "compose",
    "evaluate",
    "train",
    "report",
    "loading",
)
# What a user names as examples, read the way the models read: by their architecture and their tokenizer.
MAY_IMPORT["opening"] = (*MAY_IMPORT["loading"], "loading", "data", "sampling")
MAY_IMPORT["adapting"] = (*MAY_IMPORT["loading"], "loading", "adapters")
MAY_IMPORT["report"] = (*ALL_ABOVE, "stream", "train", "evaluate", "recipes")
MAY_IMPORT["combining"] = (*MAY_IMPORT["loading"], "loading", "merge", "interpolate")
MAY_IMPORT["polish"] = ALL_ABOVE  # a transport that is done, and what a few examples make of it
MAY_IMPORT["evaluating"] = (*MAY_IMPORT["loading"], "loading", "data", "sampling", "opening", "evaluate")
MAY_IMPORT["composing"] = (*MAY_IMPORT["loading"], "loading", "data", "sampling", "opening", "compose")
for room in ("merging", "api", "commands", "demo", "cli", "__init__", "__main__"):
    above = (
        "stream",
        "train",
        "evaluate",
        "compose",
        "sampling",
        "adapters",
        "loading",
        "adapting",
        "recipes",
        "report",
        "merging",
        "combining",
        "opening",
        "composing",
        "evaluating",
        "polish",
        "deciding",
        "api",
        "commands",
        "demo",
        "cli",
    )
    MAY_IMPORT[room] = (*ALL_ABOVE, *above)

# Packages from outside -> rooms that may import them. Not listed: the standard library, jax, numpy.
OUTSIDE = {
    "scipy": {"align", "merge", "interpolate", "data"},
    "flax": {"models"},
    "optax": {"train", "teach", "evaluate", "compose", "align"},
    "orbax": {"checkpoint", "train"},
    "safetensors": set(),
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "ml_dtypes": {"checkpoint", "tree", "recipes", "stream", "report"},
    "matplotlib": {"report", "data"},
    "PIL": {"data"},
    "tensorboardX": {"train"},
    "yaml": {"recipes", "report"},
    "mergekit": set(),
    "absl": set(),
    "ml_collections": {"demo"},
    "torch": set(),
    "transformers": set(),
    "tokenizers": {"data"},
    "tensorflow": set(),
    "sklearn": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path):
    """Every module imported anywhere in a file, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "jaxtune":  # from jaxtune import tree
                yield from (f"jaxtune.{alias.name}" for alias in node.names)
            else:
                yield node.module


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_from_the_rooms_above_only(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is no room of design.md; name it in this test with what it may import"
    for module in imports_of(path):
        words = module.split(".")
        if words[0] == "jaxtune" and len(words) > 1:
            assert words[1] == room or words[1] in MAY_IMPORT[room], f"{path.name} imports {module}"
        elif words[0] in OUTSIDE:
            assert room in OUTSIDE[words[0]], f"{room} imports {module}"


def test_configs_import_nothing_of_ours():
    for path in (ROOT / "configs").glob("*.py"):
        assert not [m for m in imports_of(path) if m.split(".")[0] in ("jaxtune", "experiments")], path


def test_importing_the_package_does_not_load_jax():
    code = "import sys, jaxtune, jaxtune.cli, jaxtune.tree; print('jax' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.split()[0] == "False"
