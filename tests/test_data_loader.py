"""The loader: every record once an epoch, the same bits after a stop, and a thread that goes away."""

import gc
import json
import threading
import time

import numpy as np
import pytest

from jaxtune.data import ArraySource, Loader
from jaxtune.errors import DataError


def make_source(count=23):
    images = np.zeros((count, 2, 2), np.uint8)
    images[:, 0, 0] = np.arange(count)
    return ArraySource("counted", "train", images, np.arange(count) % 4, ["a", "b", "c", "d"])


def numbers(batch):
    return np.rint(batch["image"][:, 0, 0, 0] * 255).astype(int).tolist()


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxtune-loader")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not loader_threads()


@pytest.mark.parametrize("drop_remainder", [True, False])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_an_epoch_holds_every_record_once(drop_remainder, prefetch):
    loader = Loader(make_source(), 5, seed=0, num_epochs=2, drop_remainder=drop_remainder, prefetch=prefetch)
    batches = [numbers(batch) for batch in loader]
    sizes = [5] * 4 + ([] if drop_remainder else [3])
    assert [len(batch) for batch in batches] == sizes * 2
    assert loader.num_batches == len(sizes)
    epochs = [np.concatenate(part).tolist() for part in (batches[: len(sizes)], batches[len(sizes) :])]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == (20 if drop_remainder else 23)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_the_order_is_a_function_of_seed_and_epoch():
    def first_epochs(seed, batch_size):
        stream = iter(Loader(make_source(), batch_size, seed=seed, drop_remainder=False))
        taken = []
        while len(taken) < 46:
            taken.extend(numbers(next(stream)))
        return taken

    assert first_epochs(3, 5) == first_epochs(3, 23) == first_epochs(3, 1)
    assert first_epochs(3, 5) != first_epochs(4, 5)
    assert first_epochs(-1, 5) == first_epochs(2**64 - 1, 5)  # taken modulo 2**64


def test_without_shuffle_records_come_in_order():
    loader = Loader(make_source(7), 3, seed=0, shuffle=False, drop_remainder=False, num_epochs=2)
    assert [numbers(batch) for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]] * 2


@pytest.mark.parametrize("drop_remainder", [True, False])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_going_on_from_every_position_equals_not_having_stopped(drop_remainder, prefetch):
    def fresh():
        mark = (lambda batch, indices: {**batch, "index": indices},)
        return Loader(
            make_source(), 4, seed=7, maps=mark, num_epochs=3, drop_remainder=drop_remainder, prefetch=prefetch
        )

    whole = list(fresh())
    for stop in range(len(whole) + 1):
        stopped = fresh()
        stream = iter(stopped)
        for _ in range(stop):
            next(stream)
        saved = json.loads(json.dumps(stopped.state()))
        assert all(isinstance(value, int) for value in saved.values())
        resumed = fresh()
        resumed.restore(saved)
        assert resumed.state() == saved
        rest = list(resumed)
        assert len(rest) == len(whole) - stop
        for ours, theirs in zip(rest, whole[stop:], strict=True):
            for key in theirs:
                np.testing.assert_array_equal(ours[key], theirs[key], strict=True)
        assert list(resumed) == []  # one pass


def test_iterating_again_goes_on():
    loader = Loader(make_source(), 5, seed=0, shuffle=False)
    for batch in loader:
        assert numbers(batch) == [0, 1, 2, 3, 4]
        break
    assert numbers(next(iter(loader))) == [5, 6, 7, 8, 9]


def test_an_iterator_left_behind_says_so():
    loader = Loader(make_source(), 5, seed=0)
    stale = iter(loader)
    next(stale)
    loader.restore(loader.state() | {"batch": 0})
    with pytest.raises(RuntimeError, match="moved by restore"):
        next(stale)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 4}, {"shuffle": False}, {"drop_remainder": False}, {"count": 24}]
)
def test_a_position_of_another_order_is_refused(change):
    def make(seed=0, batch_size=5, count=23, **options):
        return Loader(make_source(count), batch_size, seed=seed, **options)

    with pytest.raises(DataError, match=r"position is one of another order of batches: .* was .*, is "):
        make(**change).restore(make().state())
    with pytest.raises(DataError, match="not a state of a loader"):
        make().restore({"epoch": 1})


def test_maps_see_the_numbers_of_the_records_in_turn():
    def double(batch, indices):
        np.testing.assert_array_equal(indices, numbers(batch))
        return {**batch, "seen": indices * 2}

    loader = Loader(make_source(), 5, seed=0, num_epochs=1, maps=(double, lambda batch, _: {"seen": batch["seen"] + 1}))
    assert sorted(np.concatenate([batch["seen"] for batch in loader]))[0] % 2 == 1
    assert loader.state()["epoch"] == 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_a_map_comes_out_at_its_batch(prefetch):
    def fail(batch, indices):
        if 12 in indices:
            raise KeyError("twelve")
        return batch

    loader = Loader(make_source(), 5, seed=0, shuffle=False, maps=(fail,), prefetch=prefetch)
    stream = iter(loader)
    assert [numbers(next(stream))[0] for _ in range(2)] == [0, 5]
    with pytest.raises(KeyError, match="twelve"):
        next(stream)
    assert loader.state()["batch"] == 2  # the batch that failed was not handed out


def test_the_thread_works_ahead_and_ends_with_its_iterator():
    made = []

    def note(batch, indices):
        made.append(int(indices[0]))
        return batch

    loader = Loader(make_source(), 1, seed=0, shuffle=False, maps=(note,), prefetch=3)
    stream = iter(loader)
    next(stream)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [0, 1, 2, 3]  # one handed out and three ahead, never more
    assert len(loader_threads()) == 1
    del stream
    gc.collect()
    assert not loader_threads()
    assert loader.state()["batch"] == 1  # what was made ahead was not handed out


def test_a_dropped_iterator_does_not_wait_for_all_it_had_planned():
    made, is_dropped = [], threading.Event()

    def wait_for_the_end(batch, indices):
        made.append(int(indices[0]))
        if len(made) > 1:
            assert is_dropped.wait(10)
            time.sleep(0.05)  # still at work when the iterator goes
        return batch

    stream = iter(Loader(make_source(), 1, seed=0, maps=(wait_for_the_end,), prefetch=15))
    next(stream)
    is_dropped.set()
    stream.close()
    assert not loader_threads()
    assert len(made) <= 3


def test_what_cannot_be_loaded_is_refused():
    class Empty:
        name, split, class_names = "empty", "test", ()

        def __len__(self):
            return 0

    with pytest.raises(DataError, match=r"empty \(test\): there are no records"):
        Loader(Empty(), 1, seed=0)
    with pytest.raises(DataError, match="batch_size 24 exceeds its 23 records"):
        Loader(make_source(), 24, seed=0)
    assert [len(numbers(b)) for b in Loader(make_source(), 24, seed=0, drop_remainder=False, num_epochs=1)] == [23]
    for options in ({"batch_size": 0}, {"num_epochs": 0}, {"prefetch": -1}):
        with pytest.raises(DataError, match="must be at least"):
            Loader(make_source(), **{"batch_size": 2, "seed": 0, **options})
