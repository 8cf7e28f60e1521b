"""`jaxtune merge`: a recipe in, one model out."""

import contextlib
import ctypes
import glob
import os
import re
from typing import Any

from jaxtune.checkpoint import refuse_existing
from jaxtune.commands.mergekit_flags import apply_flags
from jaxtune.errors import ConfigError, OutputError
from jaxtune.merging import PlannedMerge, merge_recipe, plan_recipe
from jaxtune.recipes.jobs import Transported
from jaxtune.report.run import Run
from jaxtune.report.table import count_bytes, render_table
from jaxtune.stream.processes import ALONE, join_processes

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
M_TRIM_THRESHOLD = -1  # of glibc's malloc.h
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")


def run(arguments) -> None:
    """Plans or does the merge that the arguments ask for."""
    limits = {"memory_bytes": parse_bytes(arguments.memory), "num_workers": arguments.threads}
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads {arguments.threads}: expected at least 1.")
    apply_flags(arguments)
    if arguments.plan:
        for one in plan_recipe(arguments.recipe, seed=arguments.random_seed, **limits):
            print(describe_plan(one))
        return
    out = arguments.out or arguments.place
    if out is None:
        raise OutputError("--out DIR is missing: it says where the result goes.")
    if None not in (arguments.out, arguments.place):
        raise OutputError(f"two places for the result: {arguments.place} and --out {arguments.out}. Give one.")
    refuse_existing(out, overwrite=arguments.overwrite)
    keep_freed_memory()
    processes = ALONE
    if arguments.distributed or arguments.coordinator:
        processes = join_processes(arguments.coordinator, arguments.process, arguments.processes)
    report = merge_recipe(
        arguments.recipe,
        out,
        seed=arguments.random_seed,
        overwrite=arguments.overwrite,
        merge_span=_choose_arithmetic(arguments.device),
        processes=processes,
        run=Run("merge"),
        **limits,
    )
    if processes.is_first:
        print(summarise(report, out))


def describe_plan(planned: PlannedMerge) -> str:
    """The table that `--plan` prints."""
    plan, jobs = planned.plan, planned.jobs
    rows = [
        {"what": "merge", "value": planned.recipe.name or planned.recipe.merge_method},
        *({"what": f"model {n}", "value": _name(model)} for n, model in enumerate(jobs.models)),
        {"what": "tensors", "value": _count(plan.methods)},
        {"what": "dtypes", "value": _count(plan.dtypes)},
        {"what": "files", "value": f"{len(planned.files.headers)}"},
        {"what": "read", "value": count_bytes(plan.read_bytes)},
        {"what": "write", "value": count_bytes(plan.write_bytes)},
        {"what": "memory, at most about", "value": f"{count_bytes(plan.memory_bytes)}, {plan.num_workers} workers"},
        {"what": "time with warm files, about", "value": f"{plan.seconds:.1f} s"},
        *({"what": "note", "value": note} for note in (*jobs.notes, *_work_before(jobs))),
    ]
    return render_table({"what": "plan", "value": ""}, rows) + "\nThese models fit together. Nothing was written."


def _name(model) -> str:
    words = f", carried over from {model.base.path}" if isinstance(model, Transported) else ""
    return f"{model.path}{words}"


def _work_before(jobs) -> list[str]:
    """What is done before the merge, and no part of the figures."""
    count = sum(isinstance(model, Transported) for model in jobs.models)
    return [
        f"{count} model{'s are' if count > 1 else ' is'} carried over first: memory and time of that come on top"
    ] * bool(count)


def summarise(report: dict[str, Any], out: str) -> str:
    """What is printed when the model is there."""
    cost, plan = report["cost"], report["plan"]
    seconds = cost["seconds"]
    rows = [
        {"what": "tensors", "value": _count(plan["methods"])},
        {"what": "files", "value": ", ".join(report["output"]["files"])},
        {"what": "time (of it the merge)", "value": f"{seconds['total']} s ({seconds['merge']} s)"},
        *({"what": "own memory", "value": count_bytes(own)} for own in [cost["own_memory_bytes"]] if own),
        *({"what": "note", "value": note} for note in report["notes"]),
        {"what": "written", "value": str(out)},
    ]
    return render_table({"what": "merge", "value": ""}, rows)


def parse_bytes(text: str | None) -> int | None:
    """ "1GiB", "512M", "2e9" -> bytes.

    Raises:
        ConfigError: no such number.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    try:
        return int(float(found[1]) * UNITS[found[2]])
    except (TypeError, ValueError):
        raise ConfigError(f"--memory {text}: expected a number of bytes, for instance 1GiB or 512MiB.") from None


def keep_freed_memory() -> None:
    """Blocks that come and go by the thousand stay with the process: giving them back costs more than arithmetic."""
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 256 * 2**20)


def _choose_arithmetic(device):
    """NumPy on a host without accelerators, where it is faster than starting JAX; else all local devices."""
    if device == "auto":
        device = "jax" if any(map(glob.glob, ACCELERATORS)) else "host"
    if device == "host":
        return None
    from jaxtune.stream.device import DeviceMerge

    return DeviceMerge()


def _count(numbers):
    return ", ".join(f"{number} {name}" for name, number in numbers.items())
