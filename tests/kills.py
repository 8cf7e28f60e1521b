"""A run that is killed right behind the n-th of its saves, for tests of going on."""

import pytest

from jaxtune.train.checkpoints import StateSeries


class Killed(KeyboardInterrupt):
    """Ctrl-C, told from a real one."""


def kill_behind(number, run):
    """Calls `run` and ends it behind its `number`-th save, whatever the series."""
    real, count = StateSeries.save, []

    def save(self, *arguments):
        real(self, *arguments)
        count.append(1)
        if len(count) == number:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateSeries, "save", save)
        with pytest.raises(Killed):
            run()
