"""Carries a fine-tune along a chain of releases, with a little training on each or none, beside training anew.

    python -m experiments.versions --config=configs/versions.py --workdir=runs/versions

Leaves in the workdir: checkpoints/ (every release and fine-tune, made once), versions.json and versions.md. The same
command goes on after an interruption.
"""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import ml_collections

from experiments.command import run_main
from experiments.fitting import check_fields
from experiments.rungs.networks import Networks, Schedule
from experiments.sources import open_task
from experiments.workdir import CHECKPOINTS_NAME, Workdir
from jaxtune.compose.measuring import measure
from jaxtune.compose.versions import check_connection, recycle, transfer_difference
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.sampling import make_sample

FIELDS = (
    "seed",
    "num_seeds",  # chains, each with a seed of its own
    "model",  # config of a model family
    "releases",  # ({"data": see experiments.sources, "schedule": num_steps, learning_rate, batch_size}, ...)
    "task",  # data of the fine-tune
    "finetune.num_steps",  # of a whole fine-tune
    "finetune.learning_rate",
    "finetune.batch_size",
    "short_steps",  # lengths of training on a release after the first, beside the whole one
)
WAYS = ("anew", "first difference", "recycled")


def compare(config: ml_collections.ConfigDict, path: Path, overrides: Sequence[str] = ()) -> int | None:
    """Runs every chain in the folder `path`, and writes what came out."""
    check_fields(config, FIELDS)
    plain = config.to_dict()
    workdir = Workdir(path, plain, overrides=overrides, parents={}, seeds={"seed": config.seed})
    rows = [row for n in range(config.num_seeds) for row in run_chain(plain, path, config.seed + n)]
    workdir.publish_text("versions.json", json.dumps({"config": plain, "rows": rows}, indent=1) + "\n")
    page = render_page(rows)
    workdir.publish_text("versions.md", page)
    print(page)
    return None


def run_chain(config: dict, path: Path, seed: int) -> list[dict]:
    """One chain: a row for each release behind the first, way and length of training.

    "anew" trains from the release itself; "first difference" from the release and what the whole fine-tune of the first
    release had changed; "recycled" from the release and what its predecessor's fine-tune, made this very way, had.
    """
    model = registry.config_from_dict(config["model"])
    networks = Networks(model, path / CHECKPOINTS_NAME / f"seed_{seed}")
    releases = []
    for number, release in enumerate(config["releases"]):
        start = releases[-1] if releases else registry.init(named_key(jax.random.key(seed), "init"), model)
        source, schedule = open_task(release["data"], "train"), Schedule(**release["schedule"])
        releases.append(networks.train(f"release_{number}", lambda start=start: start, source, schedule, seed=seed))
    whole, task = Schedule(**config["finetune"]), open_task(config["task"], "train")
    test, support = (
        make_sample(model, open_task(data, "test")) for data in (config["task"], config["releases"][0]["data"])
    )

    def tune(name, params, num_steps):
        if not num_steps:
            return params
        schedule = replace(whole, num_steps=num_steps)
        return networks.train(f"{name}_{num_steps}", lambda: params, task, schedule, seed=seed)

    first = tune("anew_0", releases[0], whole.num_steps)
    lines = [check_connection(*pair, [support, test]) for pair in itertools.pairwise(releases)]
    rows = []
    for num_steps in (*config["short_steps"], whole.num_steps):
        # A chain whose first fine-tune is whole, and whose others are as long as the row says.
        lengths = [whole.num_steps] + [num_steps] * (len(releases) - 1)
        chain = recycle(
            releases, lambda p, n, s=lengths, k=num_steps: tune(f"recycled_{k}_of_{n}" if n else "anew_0", p, s[n])
        )
        for number in range(1, len(releases)):
            carried = transfer_difference(releases[0], first, releases[number])
            found = {
                "anew": tune(f"anew_{number}", releases[number], num_steps),
                "first difference": tune(f"first_{number}", carried, num_steps),
                "recycled": chain[number].tuned,
            }
            barriers = {name: line.barrier.height for name, line in lines[number - 1].items()}
            for way, params in found.items():
                scores = measure(params, test)
                row = {"seed": seed, "release": number, "steps": num_steps, "way": way}
                rows.append(row | {name: scores[name] for name in ("accuracy", "loss")} | {"barriers": barriers})
    return rows


def render_page(rows: Sequence[dict]) -> str:
    """Mean test accuracy and standard deviation over the chains, and the barriers between releases."""
    steps = sorted({row["steps"] for row in rows})
    lines = ["| release | way | " + " | ".join(f"{s} steps" for s in steps) + " |", "|---|---|" + "---|" * len(steps)]
    for release in sorted({row["release"] for row in rows}):
        for way in WAYS:
            cells = [_cell([r["accuracy"] for r in rows if _is(r, release, way, s)]) for s in steps]
            lines.append(f"| {release + 1} | {way} | " + " | ".join(cells) + " |")
    lines += ["", "Barrier between a release and the one before, in nats, 25 points, highest over the chains:", ""]
    for release in sorted({row["release"] for row in rows}):
        found = [row["barriers"] for row in rows if row["release"] == release]
        told = ", ".join(f"{name} {max(one[name] for one in found):.4f}" for name in found[0])
        lines.append(f"- release {release + 1}: {told}")
    return "\n".join(lines) + "\n"


def _is(row, release, way, steps):
    return (row["release"], row["way"], row["steps"]) == (release, way, steps)


def _cell(values):
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    run_main(compare)
