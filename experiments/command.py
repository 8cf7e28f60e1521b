"""From a command line to a run, and from what went wrong to an exit code."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from jaxtune.errors import ConfigError, JaxtuneError

flags.disclaim_key_flags()  # the flags defined here belong to the program that runs, and so does their --help

# (config, workdir, overrides as said) -> signal that ended the run early, or None
Run = Callable[[ml_collections.ConfigDict, Path, Sequence[str]], int | None]


def run_main(run: Run) -> None:
    """Parses `--config`, its overrides and `--workdir`, runs, exits: 0 done, 2 the user's mistake, 1 ours.

    A run that a signal ended exits with 128 + the signal's number, as shells expect.
    """
    config = config_flags.DEFINE_config_file("config", help_string="Python file with get_config().", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run; an unfinished run in it goes on.")
    overrides: list[str] = []

    def parse(argv):
        try:
            rest = flags.FLAGS(argv)
            if len(rest) > 1:
                raise ConfigError(f"unexpected argument {rest[1]!r}. Overrides look like --config.seed=1.")
            if config.value is None or workdir.value is None:
                raise ConfigError("both --config=FILE.py and --workdir=DIR are needed.")
            if not isinstance(config.value, ml_collections.ConfigDict):
                raise ConfigError("--config: the file cannot be read, or its get_config() returns no ConfigDict.")
        except (flags.Error, JaxtuneError, OSError) as error:
            _exit_with_message(str(error))
        except (AttributeError, KeyError) as error:  # what config_flags makes of an override of an unknown field
            _exit_with_message(f"--config: there is no such field, or no get_config(): {error}")
        overrides.extend(word for word in argv[1:] if word.lstrip("-").startswith("config."))
        return rest

    def main(_):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # app.run asks for INFO, and orbax answers at length
        try:
            stopped_by = run(config.value, Path(workdir.value), overrides)
        except JaxtuneError as error:
            _exit_with_message(str(error))
        except KeyboardInterrupt:
            stopped_by = signal.SIGINT
        if stopped_by is not None:
            print(
                f"Stopped by {signal.Signals(stopped_by).name}. The same command goes on from the last checkpoint.",
                file=sys.stderr,
            )
            sys.exit(128 + stopped_by)

    app.run(main, flags_parser=parse)


def _exit_with_message(message):
    print(message, file=sys.stderr)
    sys.exit(2)
