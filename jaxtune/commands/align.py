"""`jaxtune align`: the symmetry element that brings one base close to another, with its evidence."""

import numpy as np

import jaxtune
from jaxtune import checkpoint
from jaxtune.align.registry import METHODS
from jaxtune.checkpoint import safetensors
from jaxtune.checkpoint.output import write_extra_files
from jaxtune.checkpoint.publish import publish
from jaxtune.commands.examples import hash_sample, open_examples
from jaxtune.commands.options import describe_inputs, load_models, parse_options, read_config, refuse_output
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.loading import network_of
from jaxtune.report.evidence import ADVICE, evidence_rows, evidence_section
from jaxtune.report.page import Section, render_page
from jaxtune.report.run import Run, describe_host, to_json
from jaxtune.report.table import count_bytes, render_table

ELEMENT_NAME = "alignment.safetensors"
EXACT = "The folder holds the moved source: the same function, in the target's coordinates."
INEXACT = (
    "The element has one order per junction of the stream, which a stock network cannot express, so the moved "
    "source is not written; alignment.safetensors holds the element."
)
FOLDED = (
    "The element moves folded weights (jaxtune.symmetry.canonical). The folder holds the moved source with every gain "
    "at 1: the same function, in the folded target's coordinates."
)
UNHELD = (
    "The element moves folded weights (jaxtune.symmetry.canonical), for which no network of this family has a place: "
    "the moved source is not written; alignment.safetensors holds the element."
)


def run(arguments) -> None:
    """Finds the element, writes it with its evidence and, where it is exact, the moved source."""
    if arguments.method not in METHODS:
        raise unknown_name("align method", arguments.method, METHODS)
    options = parse_options(arguments.option, METHODS[arguments.method].options, f"align method {arguments.method!r}")
    paths = {"source": arguments.source, "target": arguments.target}
    refuse_output(arguments.out, arguments.overwrite, list(paths.values()))
    work = Run("align")
    with work.stage("load"):
        models = load_models(paths, read_config(arguments.config))
        sample = _open_sample(arguments, models["target"])
    with work.stage("align"):
        found = jaxtune.align(
            *models.values(),
            method=arguments.method,
            sample=sample,
            seed=arguments.seed,
            verify=arguments.verify,
            **options,
        )
    report = {
        "command": "align",
        "inputs": describe_inputs(models),
        "config": models["source"].config,
        "method": {"name": arguments.method, "options": {**METHODS[arguments.method].options, **options}},
        "seed": arguments.seed,
        "examples": _describe(arguments, sample),
        "is_exact": found.spec.is_exact,
        "is_folded": METHODS[arguments.method].is_folded,
        "holds_moved_source": found.spec.is_exact and found.params is not None,
        "groups": {
            name: {"size": group.size, "kind": group.kind, "role": group.role}
            for name, group in found.spec.groups.items()
        },
        "info": found.info,
        "evidence": found.evidence.as_dict(),
        "equivalence": None if found.equivalence is None else found.equivalence.as_dict(),
        "host": describe_host(),
        "cost": work.cost(),
    }
    reports = {"report.json": to_json(report), "report.html": _page(report)}
    with publish(arguments.out, overwrite=arguments.overwrite, inputs=paths.values()) as folder:
        element = {name: np.asarray(value) for name, value in found.element.items()}
        safetensors.make_header(element).write(folder / ELEMENT_NAME, element.__getitem__)
        if report["holds_moved_source"]:
            source = models["source"]
            checkpoint.write_checkpoint(folder, found.params, source.layout, side_files=source.side_files)
        write_extra_files(folder, {name: text.encode() for name, text in reports.items()})
    print(_summary(report, arguments.out))


def _open_sample(arguments, model):
    """Examples for a method that looks at some; an argument that nothing would read is refused."""
    needed = METHODS[arguments.method].data
    if arguments.data is None:
        for name in ("samples", "data_option"):
            if getattr(arguments, name):
                raise ConfigError(f"--{name.replace('_', '-')} goes with --data DATA, which says where examples are.")
        if needed != "none":
            raise ConfigError(f"--method {arguments.method} needs {needed}: give --data DATA.")
        return None
    if needed == "none":
        raise ConfigError(f"--data: align method {arguments.method!r} does not look at examples (`jaxtune methods`).")
    how = {"num_examples": arguments.samples, "seed": arguments.seed, "needs_labels": needed == "labelled examples"}
    return open_examples(arguments.data, arguments.data_option, network_of(model), model, **how)


def _describe(arguments, sample):
    if sample is None:
        return None
    facts = {"data": arguments.data, "options": list(arguments.data_option), "num_examples": len(sample)}
    return facts | {"sha256": hash_sample(sample)}


def _rows(report):
    rows = [{"what": "method", "value": report["method"]["name"]}]
    rows += evidence_rows(report["evidence"], report["equivalence"])
    rows.append({"what": "time", "value": f"{report['cost']['seconds']['total']} s"})
    rows.append({"what": "peak memory", "value": count_bytes(report["cost"]["peak_memory_bytes"])})
    return rows


def _summary(report, out):
    table = render_table({"what": "align", "value": ""}, _rows(report))
    verdict = ADVICE[report["evidence"]["lineage"]["verdict"]]
    return f"{table}\n\n{verdict}\n\n{_what_is_written(report)}\nWritten to {out}."


def _what_is_written(report):
    if report["is_folded"]:
        return FOLDED if report["holds_moved_source"] else UNHELD
    return EXACT if report["is_exact"] else INEXACT


def _page(report):
    sections = [Section("What was done", [_what_is_written(report)], {"what": "", "value": ""}, _rows(report))]
    return render_page("jaxtune align", sections + evidence_section(report["evidence"], report["equivalence"]))
