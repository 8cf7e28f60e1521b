"""What a merge says of its work: report.json and the model card."""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import yaml

from jaxtune.checkpoint import Checkpoint
from jaxtune.recipes.jobs import MergeJobs
from jaxtune.report.card import render_card
from jaxtune.stream.checksums import crc32_of_sample
from jaxtune.stream.plan import MergePlan
from jaxtune.version import __version__


def describe_model(model: Checkpoint) -> dict[str, Any]:
    """Path of a model; of each of its files of tensors the size and, in hexadecimal, the CRC-32 (`crc32_of_sample`)."""
    if model.read_from:
        places = dict(model.read_from)
    else:
        root = model.path if model.path.is_dir() else model.path.parent
        places = {file.name: root / file.name for file in model.layout.files}
    return {"path": str(model.path), "format": model.format, "files": _checksums(places)}


def describe_adapter(folder: Path) -> dict[str, Any]:
    """The same of an adapter's folder."""
    places = {place.name: place for place in folder.iterdir() if place.suffix in (".safetensors", ".json")}
    return {"path": str(folder), "format": "peft", "files": _checksums(places)}


def _checksums(places):
    files = {}
    for name, place in sorted(places.items()):
        if place.is_file():
            crc, is_whole = crc32_of_sample(place)
            files[name] = {
                "bytes": place.stat().st_size,
                "crc32": f"{crc:08x}",
                "of": "the whole" if is_whole else "a sample",
            }
    return files


def describe_merge(
    jobs: MergeJobs, plan: MergePlan, crc32: Mapping[str, int], inputs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """report.json of a merge, without its cost."""
    return {
        "command": "merge",
        "recipe": jobs.recipe,
        "inputs": list(inputs),
        "output": {"files": {name: f"{crc:08x}" for name, crc in crc32.items()}},
        "plan": dataclasses.asdict(plan),
        "seeds": {"seed": jobs.seed},
        "notes": list(jobs.notes),
        "versions": versions(),
    }


def describe_card(name: str, jobs: MergeJobs, inputs: Sequence[Mapping[str, Any]]) -> str:
    """README.md of a merge."""
    text = yaml.safe_dump(jobs.recipe, sort_keys=False, allow_unicode=True)
    return render_card(name, text, inputs, versions=versions(), notes=jobs.notes)


def versions() -> dict[str, str]:
    """Of what decides the bytes of a merge on the host."""
    return {
        "jaxtune": __version__,
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        "python": platform.python_version(),
    }
