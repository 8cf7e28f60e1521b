"""Evaluates many models in one compiled program: scales, soups, points on a line, members of a population.

One program makes a model, runs it over the data, keeps a few numbers an example, and makes the next. Models are spread
over devices, stand side by side on an accelerator (`vmap`), and come one after the other on a CPU, where a model and a
few examples stay in the cache and every core has a model of its own.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError, DataError
from jaxtune.evaluate.candidates import Candidates
from jaxtune.evaluate.classifier import Metrics, Source, check_classes, metrics_of, score_logits
from jaxtune.sample import Batch, Sample
from jaxtune.types import Params

# (params, batch) -> {name: [N, ...]}, one entry per example: pure and hashable, compiled once for all that are equal.
Score = Callable[[Params, Batch], dict[str, jax.Array]]

CPU_BATCH, DEVICE_BATCH = 16, 256  # examples at a time; few on a CPU, so that activations stay in its caches
CALLS_A_WORKER = 2  # so that workers end at about the same time
DATA_SHARE = 8  # one part in so many of the memory is for examples


@dataclass(frozen=True)
class ClassScores:
    """Scores of single-label examples, see `classifier.score_batch`.

    Attributes:
        forward: (params, batch) -> logits float[N, C]; hashable, as a `Sample` has it.
    """

    forward: Callable[[Params, Batch], jax.Array]

    def __call__(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        return score_logits(self.forward(params, batch), batch["label"])


def evaluate_many(
    candidates: Candidates,
    forward: Callable[[Params, Batch], jax.Array],
    records: Sample | Source,
    *,
    top_k: int = 5,
    batch_size: int | None = None,
    at_a_time: int | None = None,
    memory: int | None = None,
) -> list[Metrics]:
    """Evaluates each candidate as `evaluate_classifier` would one by one, in one program.

    Args:
        candidates: The models.
        forward: (params, batch) -> logits float[N, C]; that of a `Sample`, or a `sampling.Forward`.
        records: Labelled examples.
        top_k: Of `Metrics.top_k_accuracy`.
        batch_size, at_a_time, memory: As in `score_many`.

    Returns:
        One `Metrics` per candidate, in their order.

    Raises:
        ConfigError: a number below 1.
        DataError: no examples, not one label for each, or one that the models have no class for.
        NonFiniteError: the outputs of a candidate are NaN.
    """
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}; it must be at least 1.")
    if isinstance(records, Sample):
        check_classes(records)
    how = {"batch_size": batch_size, "at_a_time": at_a_time, "memory": memory}
    scores = score_many(candidates, ClassScores(forward), records, **how)
    return [metrics_of({name: x[n] for name, x in scores.items()}, top_k=top_k) for n in range(len(candidates))]


def score_many(
    candidates: Candidates,
    score: Score,
    records: Sample | Source,
    *,
    batch_size: int | None = None,
    at_a_time: int | None = None,
    memory: int | None = None,
) -> dict[str, np.ndarray]:
    """What `score` says of every example, for every candidate.

    A candidate's numbers are the same whichever others stand beside it on a CPU, where models are never stacked unless
    `at_a_time` asks for it; stacked, they differ by rounding.

    Args:
        candidates: The models.
        score: What is asked of a model and a batch.
        records: The examples; a source is read once, as many records at a time as fit.
        batch_size: Examples that one model sees at a time. None: 16 on a CPU, elsewhere 256.
        at_a_time: Models side by side on one device. None: on a CPU one, where more are slower, elsewhere as many as
            fit.
        memory: Bytes that parameters, activations and examples may take on one device, by what the compiler says of its
            program. None: a quarter of a CPU's memory, half of what an accelerator has free. One model on one batch is
            never split.

    Shapes:
        result[name]: [K, N, ...].

    Raises:
        ConfigError: a number below 1.
        DataError: no examples.
    """
    for name, number in (("batch_size", batch_size), ("at_a_time", at_a_time), ("memory", memory)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}; it must be at least 1.")
    if not len(records):
        raise DataError(f"{getattr(records, 'name', 'the source')}: there are no examples to evaluate on.")
    devices = jax.local_devices()[: len(candidates)]
    memory = memory or _free_memory(devices[0])
    batch_size = min(batch_size or (CPU_BATCH if _is_cpu() else DEVICE_BATCH), len(records))
    one_per_device, everywhere = _shardings(tuple(devices))
    shared = jax.device_put(candidates.shared, everywhere)
    parts = []
    for chunk in _chunks(records, batch_size, memory // DATA_SHARE):
        batches = jax.device_put(chunk, everywhere)
        plan = _plan(candidates, score, shared, batches, devices, at_a_time, memory)
        parts.append(_run(plan, candidates.own, shared, batches, one_per_device))
    joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    return {name: values[:, : len(records)] for name, values in joined.items()}


@dataclass(frozen=True)
class _Plan:
    """How the candidates go through the program.

    Attributes:
        program: (shared, own, is_real, batches) -> scores.
        rows: int[calls, slots]: which candidate stands where; a slot that is left over repeats one.
        is_real: bool[calls, slots]: whether the slot's candidate counts.
        at_a_time: Slots that stand side by side.
        num_workers: Calls under way at one time.
    """

    program: Callable[..., dict[str, jax.Array]]
    rows: np.ndarray
    is_real: np.ndarray
    at_a_time: int
    num_workers: int


def _plan(candidates, score, shared, batches, devices, at_a_time, memory):
    """As many models side by side, and as many calls at one time, as fit into the memory."""
    num_workers = _num_workers(len(devices))
    most = -(-len(candidates) // len(devices))
    size = min(at_a_time or (1 if _is_cpu() else most), most)
    if at_a_time is None and size > 1:
        one = jax.eval_shape(lambda: candidates.take(0))
        fit = memory // (num_workers * max(sum(map(_num_bytes, jax.tree.leaves(one))), 1))
        size = max(1, min(size, fit))
    while True:
        if at_a_time is None:
            size = -(-most // -(-most // size))  # 11 by 10 at a time are 6 and 5, not 10 and 1
        if size == 1:  # what of the candidates is their own lies on a device for the calls under way and the next
            held = sum(map(_num_bytes, jax.tree.leaves(candidates.own))) // len(devices) * (num_workers + 1)
            num_calls = min(max(CALLS_A_WORKER * num_workers, -(-held // max(memory // 2, 1))), most)
        else:
            num_calls = -(-most // size)
        parts = np.array_split(np.arange(len(candidates)), num_calls * len(devices))
        slots = size * -(-max(map(len, parts)) // size)
        own = jax.tree.map(partial(_with_rows, slots * len(devices)), candidates.own)
        program = _compile(
            score, candidates.build, size, tuple(devices), *_abstract((shared, own, batches)), _settings()
        )
        used = program.memory_analysis().temp_size_in_bytes
        if used * num_workers <= memory or (size == 1 and num_workers == 1):
            break
        if num_workers > 1:
            num_workers = max(1, min(num_workers - 1, memory // used))
        elif at_a_time is not None:
            break
        else:
            size = max(1, min(size - 1, size * memory // used))
    rows = [np.pad(part, (0, slots - len(part)), mode="edge") if len(part) else np.zeros(slots, int) for part in parts]
    is_real = [np.arange(slots) < len(part) for part in parts]
    shape = (num_calls, len(devices) * slots)
    return _Plan(program, np.reshape(rows, shape), np.reshape(is_real, shape), size, num_workers)


def _run(plan, own, shared, batches, one_per_device):
    """Scores of all candidates on some examples: {name: [K, examples]}."""

    def call(rows, is_real):
        ours = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf)[rows], own), one_per_device)
        groups = jax.device_put(is_real.reshape(-1, plan.at_a_time).any(axis=1), one_per_device)
        return ours, groups

    def work(ours, groups):  # nothing is traced here: jax's settings are those of the thread that compiled
        return jax.tree.map(np.asarray, plan.program(shared, ours, groups, batches))

    results = []
    with ThreadPoolExecutor(plan.num_workers) as pool:
        waiting = []
        for rows, is_real in zip(plan.rows, plan.is_real, strict=True):
            waiting.append(pool.submit(work, *call(rows, is_real)))
            if len(waiting) > plan.num_workers:  # parameters of the next call are ready, and of no more
                results.append(waiting.pop(0).result())
        results += [future.result() for future in waiting]
    return {name: np.concatenate([one[name] for one in results])[plan.is_real.ravel()] for name in results[0]}


@lru_cache(maxsize=64)
def _compile(score, build, at_a_time, devices, structure, leaves, settings):
    """The program for arrays of some shapes, compiled; once, however often it is asked for."""
    del settings
    one_per_device, everywhere = _shardings(devices)
    shared, own, batches = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    groups = jax.ShapeDtypeStruct((len(jax.tree.leaves(own)[0]) // at_a_time,), np.bool_)
    placed = [
        jax.tree.map(lambda leaf, sharding=sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), x)
        for x, sharding in (
            (shared, everywhere),
            (own, one_per_device),
            (groups, one_per_device),
            (batches, everywhere),
        )
    ]
    program = partial(_score_group, score, build, at_a_time)
    if len(devices) > 1:
        program = jax.shard_map(
            program,
            mesh=one_per_device.mesh,
            in_specs=(jax.P(), jax.P("models"), jax.P("models"), jax.P()),
            out_specs=jax.P("models"),
            check_vma=False,  # both branches of a `cond` would have to vary alike
        )
    return jax.jit(program).lower(*placed).compile()


def _score_group(score, build, at_a_time, shared, own, is_real, batches):
    """Scores of a few candidates: {name: [candidates, examples, ...]}; those that are not real cost nothing.

    Shapes:
        own: [slots, ...]; is_real: bool[slots / at_a_time]; batches: [batches, batch size, ...].
    """

    @jax.jit  # traced once for its shapes and its values
    def run(shared, group, batches):
        if at_a_time == 1:
            params = build(shared, jax.tree.map(lambda leaf: leaf[0], group))
            return jax.tree.map(lambda x: x[None], jax.lax.map(lambda batch: score(params, batch), batches))
        params = jax.vmap(build, (None, 0))(shared, group)
        found = jax.lax.map(lambda batch: jax.vmap(score, (0, None))(params, batch), batches)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)  # [candidates, batches, batch size]

    def step(inputs):
        group, counts = inputs
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, shared, group, batches))
        return jax.lax.cond(counts, lambda one: run(shared, one, batches), lambda _: empty, group)

    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, at_a_time, *leaf.shape[1:]), own)
    found = jax.lax.map(step, (groups, is_real))  # [groups, candidates, batches, batch size, ...]
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], -1, *x.shape[4:]), found)


def _chunks(records, batch_size, most_bytes) -> Iterator[dict[str, np.ndarray]]:
    """All examples, in equal parts of whole batches: {name: [batches, batch size, ...]}; the last is filled up."""
    num_batches = -(-len(records) // batch_size)
    one = sum(_num_bytes(values) for values in _read(records, np.arange(1)).values())
    num_chunks = min(-(-one * len(records) // max(most_bytes, 1)), num_batches)
    size = batch_size * -(-num_batches // num_chunks)
    for start in range(0, len(records), size):
        indices = np.arange(start, min(start + size, len(records)))
        batch = _read(records, np.pad(indices, (0, size - len(indices)), mode="edge"))
        yield {name: values.reshape(-1, batch_size, *values.shape[1:]) for name, values in batch.items()}


def _read(records, indices):
    if isinstance(records, Sample):
        return {name: np.asarray(values)[indices] for name, values in records.batch.items()}
    return {name: np.asarray(values) for name, values in records.__getitems__(indices).items()}


@lru_cache(maxsize=8)
def _shardings(devices):
    """(models cut over the devices, the same everywhere)."""
    mesh = jax.make_mesh((len(devices),), ("models",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    return jax.NamedSharding(mesh, jax.P("models")), jax.NamedSharding(mesh, jax.P())


def _abstract(values):
    """(structure, ((shape, dtype), ...)) of a tree of arrays: what a program is compiled for."""
    leaves, structure = jax.tree.flatten(values)
    return structure, tuple((leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype).name) for leaf in leaves)


def _settings():
    """What of jax's settings changes a program."""
    return jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision


def _num_workers(num_devices):
    """Calls under way at once: on a CPU one a core; on one accelerator a second one is ready behind the first."""
    if num_devices > 1:
        return 1
    return len(os.sched_getaffinity(0)) if _is_cpu() else 2


def _free_memory(device):
    if _is_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    stats = device.memory_stats() or {}
    return max((stats.get("bytes_limit", 2**32) - stats.get("bytes_in_use", 0)) // 2, 1)


def _is_cpu():
    return jax.default_backend() == "cpu"


def _num_bytes(leaf):
    return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize


def _with_rows(count, leaf):
    return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)
