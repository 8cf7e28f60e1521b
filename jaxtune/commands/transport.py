"""`jaxtune transport`: old base, its fine-tune, new base in; the new base with the fine-tune out."""

import contextlib
import math
from typing import Any

import numpy as np

import jaxtune
from jaxtune import checkpoint, loading
from jaxtune.adapters import extract_adapter, is_adapter, read_adapter, write_adapter
from jaxtune.adapting import carry_adapter, key_table_of, open_adapted
from jaxtune.align.memory import remember_searches
from jaxtune.checkpoint.resume import digest_of, keep_work
from jaxtune.commands.examples import describe_given, open_given
from jaxtune.commands.measure import measure_on, open_data
from jaxtune.commands.options import describe_inputs, load_models, parse_options, read_config, refuse_output
from jaxtune.commands.transport_plan import check_symmetry, describe_plan
from jaxtune.commands.transport_report import make_page, summarise
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.evaluate.doubts import doubt, doubt_names
from jaxtune.loading import check_same_architecture, network_of, other_widths
from jaxtune.report.run import Run, describe_host, to_json
from jaxtune.transport.registry import METHODS, check_widths
from jaxtune.tree import flatten, is_float, map_leaves

ROLES = ("source", "finetuned", "target")


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
        models, adapter = _load(paths, read_config(arguments.config))
        form = _output_form(arguments, adapter, models)
        others = other_widths(models)
        check_widths(arguments.method, others)
        config = check_same_architecture(
            models, roles_with_own_words=("source", "finetuned"), roles_with_own_widths=others
        )
    if arguments.plan:
        check_symmetry(config, arguments.method)
        print(describe_plan(models, arguments.method, config))
        return
    data = {name: _open_data(arguments, name, config) for name in ("evaluate", "support")}
    given = open_given(arguments, METHODS[arguments.method].data, config, models["target"])
    with work.stage("hash"):
        inputs = describe_inputs(models, adapter)
    method = {"name": arguments.method, "options": {**METHODS[arguments.method].options, **options}}
    asked = {"command": "transport", "method": method, "scale": arguments.scale, "seed": arguments.seed}
    asked |= {
        "output": {"form": form, "rank": arguments.rank},
        "examples": describe_given(arguments, given, METHODS[arguments.method].data),
    }
    if given.polish != "none" and form == "lora" and arguments.rank is None:
        raise ConfigError(
            "a polish changes weights and not the adapter's factors. Ask for full weights (--as full), for a new "
            "adapter of a given rank (--rank R), or for --polish none."
        )
    with _kept_work(arguments, models, {**asked, "inputs": inputs}) as kept:
        with work.stage("transport"):
            result = jaxtune.transport(
                **models,
                method=arguments.method,
                scale=arguments.scale,
                seed=arguments.seed,
                verify=arguments.verify,
                sample=given.sample,
                polish=given.polish,
                keep=given.keep,
                **options,
            )
        with work.stage("measure"):
            measured = _measure(models, result.params, data)
            doubts = _doubts(models, measured, data, None if others else given.sample)
        with work.stage("adapter"):
            carried, facts = _make_adapter(arguments, form, adapter, models, result)
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
            "doubts": doubts,
            "adapter": facts,
            "host": describe_host(),
            "cost": work.cost(),
        }
        output = {
            "overwrite": arguments.overwrite,
            "inputs": paths.values(),
            "extra_files": {"report.json": to_json(report), "report.html": make_page(report)},
        }
        if carried is None:
            checkpoint.save(arguments.out, result.params, like=models["target"], work=kept, **output)
        else:
            write_adapter(arguments.out, carried, **output)
    print(summarise(report, arguments.out))


def _load(paths, config):
    """({role: checkpoint}, adapter): a fine-tune that is an adapter is the old base with the adapter merged in."""
    if not is_adapter(paths["finetuned"]):
        return load_models(paths, config), None
    bases = load_models({role: path for role, path in paths.items() if role != "finetuned"}, config)
    adapter = read_adapter(paths["finetuned"])
    models = bases | {"finetuned": open_adapted(adapter, bases["source"])}
    return {role: models[role] for role in ROLES}, adapter


def _output_form(arguments, adapter, models):
    """ "lora" or "full": as asked, else as the fine-tune came."""
    form = arguments.form or ("full" if adapter is None and arguments.rank is None else "lora")
    if form == "full" and arguments.rank is not None:
        raise ConfigError("--rank: full weights have no rank. Leave it out, or ask for --as lora.")
    if form == "lora":
        if adapter is None and arguments.rank is None:
            raise ConfigError(
                "--as lora: the fine-tune is given as full weights; say the rank of its factors, --rank R."
            )
        key_table_of(models["target"])  # that the new base is of a family that PEFT knows, before any work
    return form


def _make_adapter(arguments, form, adapter, models, result):
    """(adapter to write, facts for the report); (None, None) where full weights are written."""
    if form == "full":
        return None, None
    target = models["target"]
    if arguments.rank is None:
        how = {"method": arguments.method, "scale": arguments.scale, "base": arguments.target}
        carried = carry_adapter(adapter, models["source"], target, result.prepared, **how)
        return carried, {"rank": carried.rank, "factors": "moved one by one"}
    scale = np.float32(1.0 if "polish" in result.prepared.info else arguments.scale)  # a polish is of the scaled one
    change = map_leaves(lambda _, leaf: leaf * scale, result.prepared.task_vector)
    task_type = adapter.config.get("task_type") if adapter else _task_of(target.config)
    cut = extract_adapter(
        change, key_table_of(target), target.params, rank=arguments.rank, base=arguments.target, task_type=task_type
    )
    return cut.adapter, {"rank": arguments.rank, "factors": "cut out of the moved task vector", **cut.as_dict()}


def _task_of(config):
    """PEFT's name of what a network is for, by the class that wrote it."""
    name = next(iter(config.get("architectures") or []), "")
    tasks = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    tasks |= {"ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for end, task in tasks.items() if name.endswith(end)), None)


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
        # One at a time: together they are the whole network in float32.
        leaves = (np.asarray(leaf, np.float32).ravel() for leaf in flatten(tree).values() if is_float(leaf))
        return float(np.sqrt(sum(np.dot(leaf, leaf).astype(np.float64) for leaf in leaves)))

    moved, base = norm(result.prepared.task_vector), norm(models["target"].params)
    return {"norm": moved, "relative_to_target": moved / max(base, np.finfo(np.float64).tiny)}


def _open_data(arguments, name, config):
    pairs = getattr(arguments, f"{name}_option")
    if pairs and not getattr(arguments, name):
        raise ConfigError(f"--{name}-option goes with --{name} DATA.")
    return open_data(getattr(arguments, name), pairs, config)


def _doubts(models, measured, data, sample) -> list[str]:
    """What says that the fine-tune's outputs are read by other names of classes than those it was tuned with."""
    found = {}
    if sample is not None:
        found["--data"] = doubt_names(sample, models["finetuned"].params)
    task = data["evaluate"]
    if task is not None and task.embeddings is not None:
        classes, outputs = task.embeddings.shape
        found["--evaluate"] = doubt(measured[1]["task"], len(task.source), num_classes=classes, num_outputs=outputs)
    return [f"{flag}: the fine-tune has {words} ({flag}-option)." for flag, words in found.items() if words]


def _measure(models, params, data) -> list[dict[str, Any]]:
    """Accuracy of every model involved on the data that was named; none where no data was."""
    if not any(data.values()):
        return []
    rows = []
    for name, role, tree in (
        ("old base", "source", models["source"].params),
        ("old base, fine-tuned", "finetuned", models["finetuned"].params),
        ("new base", "target", models["target"].params),
        ("new base with the fine-tune", "target", params),
    ):
        row = {"model": name}
        for column, key in (("task", "evaluate"), ("support", "support")):
            if data[key]:
                row[column] = measure_on(network_of(models[role]), tree, data[key]).accuracy
        rows.append(row)
    return rows
