"""How recipes name models, and the folder that a name stands for; nothing is downloaded."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from jaxtune.recipes.nodes import Node, RecipeError

FORMS = "expected a model: PATH, PATH+LORA, or {model: {path: PATH, revision: R}, lora: {path: LORA}}"


@dataclass(frozen=True)
class ModelReference:
    """A model as a recipe names it; equal ones are one model.

    Attributes:
        path: Folder or file, or a name on the Hugging Face hub.
        revision: Of a name on the hub; None is its main one.
        lora: Folder or name of an adapter that is merged in first.
        lora_revision: As `revision`.
        architecture: What stands in for "architectures" of its config.json.
    """

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None
    architecture: str | None = None

    def __str__(self):
        base = _with_revision(self.path, self.revision)
        return base if self.lora is None else f"{base}+{_with_revision(self.lora, self.lora_revision)}"


def parse_reference(node: Node) -> ModelReference:
    """A model from its text or its keys.

    Raises:
        RecipeError: neither of the forms.
    """
    if isinstance(node.value, dict):
        node.check_keys(("model", "lora", "override_architecture", "path", "revision"))
        if "path" in node.value:  # a bare {path, revision}
            path, revision = _parse_path(node)
            return ModelReference(path, revision)
        if node.get("model") is None:
            raise node.error(f"{FORMS}; there is no 'model'.")
        path, revision = _parse_path(node.get("model"))
        lora, lora_revision = _parse_path(node.get("lora")) if node.get("lora") else (None, None)
        architecture = node.get("override_architecture")
        return ModelReference(
            path, revision, lora, lora_revision, architecture and architecture.expect(str, "the name of a class")
        )
    text = node.expect(str, FORMS.removeprefix("expected ")).strip()
    if not text:
        raise node.error(f"{FORMS}, found empty text.")
    if os.path.lexists(text):  # a folder whose name has a "+" or an "@" in it
        return ModelReference(text)
    base, *adapters = text.split("+")
    if len(adapters) > 1:
        raise node.error(f"{FORMS}, found {text!r} with {len(adapters)} '+'. Merge one adapter at a time.")
    path, revision = _split_revision(node, base)
    lora, lora_revision = _split_revision(node, adapters[0]) if adapters else (None, None)
    return ModelReference(path, revision, lora, lora_revision)


def find_folder(path: str, revision: str | None, node: Node, folder: Path | None = None) -> Path:
    """Where a model lies: as it is named, beside the recipe, or in the cache of the Hugging Face hub.

    Args:
        path, revision: As the recipe has them.
        node: Where it does, for messages.
        folder: Of the recipe's file.

    Raises:
        RecipeError: nowhere; says how to get it.
    """
    given = Path(path).expanduser()
    for place in (given, *([folder / given] if folder is not None and not given.is_absolute() else [])):
        if revision is None and os.path.lexists(place):
            return place
    is_hub_name = not given.is_absolute() and 1 <= path.count("/") + 1 <= 2 and not path.startswith(".")
    if is_hub_name:
        cached = _find_cached(path, revision)
        if cached is not None:
            return cached
        wanted = f"{path} --revision {revision}" if revision else path
        raise node.error(
            f"{_with_revision(path, revision)!r} is no folder here, and not in the Hugging Face cache {_cache()}. "
            f"Nothing is downloaded: get it first (hf download {wanted}), or name a folder."
        )
    raise node.error(f"{path!r}: no such file or folder. Paths count from the current folder, then from the recipe's.")


def _find_cached(path, revision) -> Path | None:
    """Snapshot of a repository in the hub's cache, by the layout that the hub's client writes."""
    home = _cache() / ("models--" + path.replace("/", "--"))
    revision = revision or "main"
    if os.sep in revision or revision.startswith("."):
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        revision = (home / "refs" / revision).read_text().strip()
    snapshot = home / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def _cache() -> Path:
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"])
    home = os.environ.get("HF_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "huggingface") / "hub"


def _parse_path(node: Node) -> tuple[str, str | None]:
    if isinstance(node.value, dict):
        node.check_keys(("path", "revision"))
        if node.get("path") is None:
            raise node.error("expected a 'path'.")
        revision = node.get("revision")
        return node.get("path").expect(str, "a path"), revision and revision.expect(str, "a revision")
    return _split_revision(node, node.expect(str, "a path"))


def _split_revision(node: Node, text: str) -> tuple[str, str | None]:
    text = text.strip()
    if os.path.lexists(text):
        return text, None
    path, *revisions = text.split("@")
    if len(revisions) > 1 or not path:
        raise _bad_path(node, text)
    return path, revisions[0] if revisions else None


def _bad_path(node, text) -> RecipeError:
    return node.error(f"{text!r}: expected PATH or NAME@REVISION.")


def _with_revision(path, revision):
    return f"{path}@{revision}" if revision else path
