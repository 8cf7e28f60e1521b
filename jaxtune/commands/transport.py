"""`jaxtune transport`: old base, its fine-tune, new base in; the new base with the fine-tune out."""

import contextlib
import dataclasses
import math
from typing import Any

import numpy as np

import jaxtune
from jaxtune import checkpoint, loading
from jaxtune.align.memory import remember_searches
from jaxtune.checkpoint.resume import digest_of, keep_work
from jaxtune.commands.measure import measure_on, open_data
from jaxtune.commands.options import describe_inputs, load_models, parse_options, read_config, refuse_output
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.loading import check_same_architecture
from jaxtune.models import registry
from jaxtune.report.evidence import ADVICE, evidence_rows, evidence_section
from jaxtune.report.page import Section, render_page
from jaxtune.report.run import Run, describe_host, to_json
from jaxtune.report.table import count_bytes, percent, render_table
from jaxtune.symmetry.canonical import canonical_spec
from jaxtune.transport.registry import METHODS
from jaxtune.tree import count_parameters, flatten, is_float

ROLES = ("source", "finetuned", "target")
RUNTIME_BYTES = 400 * 2**20  # Python, JAX and its compiler before any weight is loaded
# Copies of the weights in float32 that a method and its evidence hold at the peak; measured at 25 M weights.
COPIES = {"identity": 14, "orthogonal_shift": 14, "permutation": 14, "transfusion": 14, "full": 19}
EXPECTED = (
    "The expected share is what arrived, at scale 1, between small vision transformers whose weights were left as far "
    "apart as these (docs/ladder.md in the repository). Your models may do better or worse: measure."
)
MEASURED_COLUMNS = {"model": "model", "task": "task accuracy", "support": "support accuracy"}


def run(arguments) -> None:
    """Plans or does the transport that the arguments ask for."""
    if arguments.method not in METHODS:
        raise unknown_name("transport method", arguments.method, METHODS)
    if not math.isfinite(arguments.scale):
        raise ConfigError(f"--scale {arguments.scale}: expected a finite number.")
    what = f"transport method {arguments.method!r}"
    options = parse_options(arguments.option, METHODS[arguments.method].options, what)
    paths = {role: getattr(arguments, role) for role in ROLES}
    if not arguments.plan:
        refuse_output(arguments.out, arguments.overwrite, list(paths.values()))
    work = Run("transport")
    with work.stage("load"):
        models = load_models(paths, read_config(arguments.config))
        config = check_same_architecture(models, roles_with_own_words=("source", "finetuned"))
    if arguments.plan:
        _check_symmetry(config, arguments.method)
        print(_plan(models, arguments.method))
        return
    data = {name: open_data(getattr(arguments, name), config) for name in ("evaluate", "support")}
    with work.stage("hash"):
        inputs = describe_inputs(models)
    method = {"name": arguments.method, "options": {**METHODS[arguments.method].options, **options}}
    asked = {"command": "transport", "method": method, "scale": arguments.scale, "seed": arguments.seed}
    with _kept_work(arguments, models, {**asked, "inputs": inputs}) as kept:
        with work.stage("transport"):
            result = jaxtune.transport(
                *models.values(),
                method=arguments.method,
                scale=arguments.scale,
                seed=arguments.seed,
                verify=arguments.verify,
                **options,
            )
        with work.stage("measure"):
            measured = _measure(config, models, result.params, data)
        report = {
            **asked,
            "inputs": inputs,
            "config": models["target"].config,
            "task_vector": _norms(models, result),
            "info": result.prepared.info,
            "evidence": None if result.evidence is None else result.evidence.as_dict(),
            "equivalence": None if result.equivalence is None else result.equivalence.as_dict(),
            "expected": result.expected,
            "measured": measured,
            "host": describe_host(),
            "cost": work.cost(),
        }
        checkpoint.save(
            arguments.out,
            result.params,
            like=models["target"],
            overwrite=arguments.overwrite,
            inputs=paths.values(),
            extra_files={"report.json": to_json(report), "report.html": _page(report)},
            work=kept,
        )
    print(_summary(report, arguments.out))


@contextlib.contextmanager
def _kept_work(arguments, models, asked):
    """For models that take long, a folder in which searches and shards outlive a killed run; None for others."""
    if models["target"].layout.num_bytes <= loading.LAZY_BYTES:
        yield None
        return
    host = {name: value for name, value in describe_host().items() if name != "num_devices"}
    with keep_work(arguments.out, digest_of({**asked, "host": host})) as kept, remember_searches(kept / "searches"):
        yield kept


def _norms(models, result) -> dict[str, float]:
    """How large the step is, beside the base that takes it."""

    def norm(tree):
        leaves = [np.asarray(leaf, np.float32).ravel() for leaf in flatten(tree).values() if is_float(leaf)]
        return float(np.sqrt(sum(np.dot(leaf, leaf).astype(np.float64) for leaf in leaves)))

    moved, base = norm(result.prepared.task_vector), norm(models["target"].params)
    return {"norm": moved, "relative_to_target": moved / max(base, np.finfo(np.float64).tiny)}


def _measure(config, models, params, data) -> list[dict[str, Any]]:
    """Accuracy of every model involved on the data that was named; none where no data was."""
    if not any(data.values()):
        return []
    rows = []
    for name, tree in (
        ("old base", models["source"].params),
        ("old base, fine-tuned", models["finetuned"].params),
        ("new base", models["target"].params),
        ("new base with the fine-tune", params),
    ):
        row = {"model": name}
        for column, key in (("task", "evaluate"), ("support", "support")):
            if data[key]:
                row[column] = measure_on(config, tree, data[key]).accuracy
        rows.append(row)
    return rows


def _rows(report):
    method = report["method"]["name"]
    chosen = report["info"].get("chosen")
    cost, vector = report["cost"], report["task_vector"]
    rows = [
        {"what": "method", "value": f"{method}: {chosen}" if chosen else method},
        {"what": "scale", "value": f"{report['scale']:g}"},
        {"what": "task vector, share of the new base's norm", "value": percent(vector["relative_to_target"], 2)},
    ]
    if report["evidence"]:
        low, high = report["expected"]
        rows.append(
            {"what": "expected share of the fine-tuning gain", "value": f"{round(100 * low)} to {round(100 * high)} %"}
        )
        rows += evidence_rows(report["evidence"], report["equivalence"])
    if report["evidence"] and report["equivalence"] is None and "num_sweeps" in report["info"]:
        rows.append({"what": "moved old base against old base", "value": "not checked: no network holds it"})
    if report["info"].get("lost"):
        worst, share = max(report["info"]["lost"].items(), key=lambda item: item[1])
        rows.append({"what": "lost on the way back, at most", "value": f"{percent(share)} ({worst})"})
    seconds = cost["seconds"]
    rows.append(
        {"what": "time (of it alignment and evidence)", "value": f"{seconds['total']} s ({seconds['transport']} s)"}
    )
    rows.append({"what": "peak memory", "value": count_bytes(cost["peak_memory_bytes"])})
    return rows


def _measured_rows(report):
    return [
        {"model": row["model"], "task": percent(row.get("task")), "support": percent(row.get("support"))}
        for row in report["measured"]
    ]


def _summary(report, out):
    parts = []
    if report["measured"]:
        parts += [render_table(MEASURED_COLUMNS, _measured_rows(report)), ""]
    parts.append(render_table({"what": "transport", "value": ""}, _rows(report)))
    if report["evidence"]:
        parts += ["", ADVICE[report["evidence"]["lineage"]["verdict"]], EXPECTED]
    if not report["measured"]:
        parts.append("Nothing was measured on data; --evaluate DATA and --support DATA do.")
    if report["inputs"]["target"]["format"] == "torch":
        parts.append(
            "The new base is stored as pickles, which are never written: the result is safetensors of its names."
        )
    parts += ["", f"Written to {out}; open {out}/report.html for the evidence block by block."]
    return "\n".join(parts)


def _page(report):
    sections = [Section("What was done", [], {"what": "", "value": ""}, _rows(report))]
    if report["measured"]:
        sections.append(Section("What it brought and what it cost", [], MEASURED_COLUMNS, _measured_rows(report)))
    if report["evidence"]:
        sections[0] = dataclasses.replace(sections[0], words=[EXPECTED])
        sections += evidence_section(report["evidence"], report["equivalence"])
    inputs = [{"role": role, "path": row["path"], "format": row["format"]} for role, row in report["inputs"].items()]
    sections.append(Section("Inputs", [], {"role": "role", "path": "path", "format": "format"}, inputs))
    return render_page("jaxtune transport", sections)


def _check_symmetry(config, method):
    """Raises what the method would raise about this family, before any weight is read."""
    if method == "full":
        canonical_spec(registry.symmetry_of(config))
    if method == "transfusion":
        registry.symmetry_of(config, junctions="each", inside="joint")


def _plan(models, method):
    stored = {role: model.layout.num_bytes for role, model in models.items()}
    names = models["target"].config
    working = 4 * count_parameters(models["target"].params)
    peak = RUNTIME_BYTES + sum(stored.values()) + COPIES.get(method, COPIES["full"]) * working
    rows = [
        {"what": "family", "value": names.get("model_type") or names.get("architecture", "")},
        {"what": "parameters", "value": f"{count_parameters(models['target'].params):,}"},
        *({"what": f"read {role}", "value": count_bytes(size)} for role, size in stored.items()),
        {"what": "write", "value": count_bytes(stored["target"])},
        {"what": "peak memory, about", "value": count_bytes(peak)},
    ]
    return render_table({"what": "plan", "value": ""}, rows) + "\nThe three fit together. Nothing was written."
