"""The README.md beside a merged model: what it is made of, and how to make it again."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def render_card(
    name: str,
    recipe: str,
    inputs: Sequence[Mapping[str, Any]],
    *,
    versions: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """A model card in Markdown, its front matter as model hubs read it.

    Args:
        name: Of the model.
        recipe: Text of the recipe.
        inputs: One a model: `path`, and `files`, name -> `bytes`, `crc32`, and what it is `of`.
        versions: Package -> version.
        notes: What a reader should know.
    """
    base = [json.dumps(str(one["path"])) for one in inputs]
    lines = ["---", "library_name: transformers", "tags:", "- merge", "- jaxtune", "base_model:"]
    lines += [f"- {path}" for path in base]
    lines += ["---", f"# {name}", "", f"A merge of {len(inputs)} models, made with jaxtune {versions['jaxtune']}.", ""]
    lines += ["## Models", "", "| model | file | bytes | CRC-32 |", "|---|---|---|---|"]
    for one in inputs:
        lines += [
            f"| {one['path']} | {name} | {file['bytes']} | `{file['crc32']}` of {file['of']} |"
            for name, file in one["files"].items()
        ]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    lines += ["", "## Recipe", "", "```yaml", recipe.rstrip("\n"), "```", ""]
    lines += ["The same recipe, models and versions give the same bytes.", ""]
    lines += [
        "| package | version |",
        "|---|---|",
        *(f"| {package} | {version} |" for package, version in versions.items()),
    ]
    return "\n".join(lines) + "\n"
