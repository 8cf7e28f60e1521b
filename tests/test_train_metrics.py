"""The CSV file after kills and resumes; TensorBoard events read back without TensorBoard."""

import builtins

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxtune.errors import ConfigError
from jaxtune.train.metrics import MetricsWriter


def write(folder, first, last):
    with MetricsWriter(folder, ["loss", "accuracy"]) as writer:
        writer.open(first)
        for step in range(first + 1, last + 1):
            writer.write(step, {"loss": 1 / step} if step % 2 else {"loss": 1 / step, "accuracy": step / 10})


def test_rows_hold_exact_numbers_and_empty_cells(tmp_path):
    write(tmp_path, 0, 3)
    assert (tmp_path / "metrics.csv").read_text() == ("step,loss,accuracy\n1,1.0,\n2,0.5,0.2\n3,0.3333333333333333,\n")


@pytest.mark.parametrize("tail", ["", "6,0.1", "6", "6,0.1,\n7,0.2,"])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, tail):
    (whole := tmp_path / "whole").mkdir()
    (broken := tmp_path / "broken").mkdir()
    write(whole, 0, 9)
    write(broken, 0, 5)
    with (broken / "metrics.csv").open("a") as file:
        file.write(tail)  # what a kill left of later rows
    write(broken, 4, 9)
    assert (broken / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_half_written_header_is_begun_again(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,lo")
    write(tmp_path, 0, 1)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,accuracy\n1,1.0,\n"


def test_another_runs_columns_are_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,perplexity\n1,2.0\n")
    with pytest.raises(ConfigError, match="another --workdir"):
        write(tmp_path, 0, 1)
    assert (tmp_path / "metrics.csv").read_text() == "step,perplexity\n1,2.0\n"


def read_events(path):
    """(step, tag, value) of a file of length-delimited records: 8 bytes length, 4 of checksum, data, 4 of checksum."""
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        events += [(event.step, value.tag, round(value.simple_value, 4)) for value in event.summary.value]
        events += [(event.step, "start", None)] if event.session_log.status == 1 else []
        data = data[16 + size :]
    return events


def test_events_hold_the_same_numbers_and_purge_what_was_dropped(tmp_path):
    write(tmp_path, 0, 2)
    (first,) = tmp_path.glob("events.out.tfevents.*")
    assert read_events(first) == [(1, "loss", 1.0), (2, "loss", 0.5), (2, "accuracy", 0.2)]
    first.rename(tmp_path / "first")
    write(tmp_path, 1, 2)
    (second,) = tmp_path.glob("events.out.tfevents.*")
    assert read_events(second)[0] == (2, "start", None)


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch, capsys):
    real_import = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "tensorboardX":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    write(tmp_path, 0, 2)
    assert capsys.readouterr().err.count("tensorboardX") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv"]
