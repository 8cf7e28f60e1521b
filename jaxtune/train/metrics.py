"""Numbers of a run, as it goes: a CSV file and TensorBoard events that stay consistent across resumes."""

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtune.errors import ConfigError


class MetricsWriter:
    """Appends rows to `metrics.csv` and scalars to TensorBoard events, both in one folder.

    The CSV holds nothing that depends on the clock: an interrupted and resumed run writes the same bytes as an
    uninterrupted one. Without tensorboardX (extra `report`) there are no events, and one line on stderr says so.

    Args:
        folder: Where both go; it must exist.
        columns: Names of the numbers, "step" not among them. A row may leave some out.
    """

    def __init__(self, folder: Path, columns: Sequence[str]):
        self.path = folder / "metrics.csv"
        self._header = ["step", *columns]
        self._file: io.TextIOBase | None = None
        self._events = None

    def open(self, step: int) -> None:
        """Begins to write after `step`; rows and events of later steps, left by a killed run, are dropped.

        Raises:
            ConfigError: the file there has other columns.
        """
        self._drop_after(step)
        self._file = self.path.open("a", newline="")
        self._events = _open_events(self.path.parent, step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row; a name without a value is an empty cell."""
        unknown = values.keys() - set(self._header)
        assert not unknown, f"no column for {sorted(unknown)}"
        csv.writer(self._file, lineterminator="\n").writerow(
            [step, *(repr(float(values[name])) if name in values else "" for name in self._header[1:])]
        )
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()

    def close(self) -> None:
        """Ends both files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _drop_after(self, step):
        """Leaves a file with the header and the rows up to `step`."""
        old = self.path.read_text() if self.path.exists() else ""
        # A kill can cut the last line anywhere, so only lines that end count.
        lines = [line for line in old.splitlines(keepends=True) if line.endswith("\n")]
        header = ",".join(self._header) + "\n"
        if lines and lines[0] != header:
            raise ConfigError(
                f"{self.path}: the columns are {lines[0].strip()}, this run writes {header.strip()}. "
                "The folder belongs to another run; choose another --workdir."
            )
        new = header + "".join(line for line in lines[1:] if int(line.split(",", 1)[0]) <= step)
        if new != old:
            temporary = self.path.with_suffix(".csv.tmp")
            temporary.write_text(new)
            os.replace(temporary, self.path)


def _open_events(folder, step):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("No TensorBoard events: tensorboardX is missing (pip install 'jaxtune[report]').", file=sys.stderr)
        return None
    # TensorBoard hides events of steps from `purge_step` on that an earlier file holds.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
