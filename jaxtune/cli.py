"""The program `jaxtune`: arguments in, one command run, errors as one message and an exit code.

Nothing heavy is imported before a command runs, so that `jaxtune --help` answers at once.
"""

import argparse
import contextlib
import ctypes
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jaxtune.commands import mergekit_flags
from jaxtune.errors import JaxtuneError
from jaxtune.version import __version__

DONE, OURS, YOURS, INTERRUPTED = 0, 1, 2, 130
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h

PATHS = """\
PATH is a folder with config.json and *.safetensors (one, or many with an index), a single .safetensors
file, an .npz file, or an orbax folder. Exit codes: 0 done; 2 something to mend in the input, with a message
that says what; 1 a fault of jaxtune itself; 130 interrupted. An output appears whole or not at all."""


def build_parser() -> argparse.ArgumentParser:
    """All commands with their arguments; each command lives in `jaxtune.commands`."""
    parser = argparse.ArgumentParser(
        prog="jaxtune",
        description="Carry a fine-tune to a new base model, without data and without training.",
        epilog=PATHS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxtune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name, summary):
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=PATHS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    demo = add("demo", "the main job on embedded data: table, figures, report")
    demo.add_argument("--out", metavar="DIR", help="also write report.html, report.json and the models there")
    demo.add_argument("--from-scratch", action="store_true", help="train the embedded checkpoints anew (minutes)")
    _add_overwrite(demo)

    inspect = add("inspect", "what is in a checkpoint: family, leaves, shapes, dtypes, symmetry")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--config", metavar="JSON", help="config.json of a checkpoint that carries none")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    align = add("align", "find the symmetry element that brings a source base close to a target base")
    align.add_argument("--source", metavar="PATH", required=True, help="the base that moves")
    align.add_argument("--target", metavar="PATH", required=True, help="the base that stays")
    align.add_argument("--method", default="weights", help="see `jaxtune methods` (default: %(default)s)")
    align.add_argument(
        "--data", metavar="DATA", help="inputs for methods that look at some: .npz, .jsonl, digits, glyphs"
    )
    align.add_argument("--samples", type=int, metavar="N", help="so many of its train split (default: 64)")
    align.add_argument(
        "--data-option", action="append", default=[], metavar="NAME=VALUE", help="of the data, for instance task=mine"
    )
    align.add_argument("--no-verify", dest="verify", action="store_false", help="do not run both networks; faster")
    _add_common(align)

    transport = add("transport", "carry a fine-tune of an old base to a new base")
    transport.add_argument("--source", metavar="PATH", required=True, help="old base")
    transport.add_argument(
        "--finetuned",
        metavar="PATH",
        required=True,
        help="fine-tune of the old base: a model, or a LoRA folder of PEFT",
    )
    transport.add_argument("--target", metavar="PATH", required=True, help="new base")
    transport.add_argument("--method", default="auto", help="see `jaxtune methods` (default: %(default)s)")
    transport.add_argument("--data", metavar="DATA", help="a few examples to go by: an .npz, .jsonl, digits or glyphs")
    transport.add_argument("--samples", type=int, metavar="N", help="so many of its train split (default: 64)")
    transport.add_argument(
        "--data-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the data: task=mine, or class_prefix=mine/ for classes whose names began so when they were tuned on",
    )
    transport.add_argument(
        "--polish",
        choices=("auto", "none", "distill"),
        default="auto",
        help="distill: teach the result to say what the fine-tune says; auto: so where method auto is given --data",
    )
    transport.add_argument("--keep", metavar="DATA", help="examples on which a polish leaves the new base as it is")
    transport.add_argument("--scale", type=float, default=1.0, help="factor of the task vector (default: %(default)s)")
    transport.add_argument(
        "--as", dest="form", choices=("full", "lora"), help="write full weights or a LoRA folder (default: as it came)"
    )
    transport.add_argument("--rank", type=int, help="of a LoRA that is cut out of the moved weights anew")
    transport.add_argument("--evaluate", metavar="DATA", help="measure the task on an .npz, digits or glyphs")
    transport.add_argument("--support", metavar="DATA", help="measure also what the base could before")
    for name in ("keep", "evaluate", "support"):
        transport.add_argument(
            f"--{name}-option", action="append", default=[], metavar="NAME=VALUE", help=f"of the data of --{name}"
        )
    transport.add_argument("--no-verify", dest="verify", action="store_false", help="gather no evidence; faster")
    transport.add_argument("--plan", action="store_true", help="check, say what it takes, write nothing")
    _add_common(transport)

    merge = add("merge", "one model of many, as a recipe says: mergekit's schema, or ours, which adds to it")
    merge.add_argument("recipe", metavar="RECIPE.yaml")
    merge.add_argument("place", metavar="DIR", nargs="?", help="where the result goes; the same as --out")
    merge.add_argument("--out", metavar="DIR", help="where the result goes")
    merge.add_argument("--random-seed", "--seed", type=_seed, help="of random methods (default: the recipe's, else 0)")
    merge.add_argument("--plan", action="store_true", help="check everything, say what it takes, write nothing")
    merge.add_argument("--memory", metavar="SIZE", default="1GiB", help="that may be used (default: %(default)s)")
    merge.add_argument("--threads", type=int, help="that work (default: one a core)")
    merge.add_argument(
        "--device",
        type=mergekit_flags.parse_device,
        default="auto",
        metavar="{auto,host,jax}",
        help="host: NumPy; jax: all local devices; auto: jax where there is an accelerator (default: %(default)s)",
    )
    merge.add_argument("--distributed", action="store_true", help="several processes, as the cluster starts them")
    merge.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes that are started by hand")
    merge.add_argument("--process", type=int, help="number of this one")
    merge.add_argument("--processes", type=int, help="how many there are")
    _add_overwrite(merge)
    mergekit_flags.add_flags(merge)

    interpolate = add("interpolate", "a model on the straight line between two")
    interpolate.add_argument("first", metavar="A", help="weight 0")
    interpolate.add_argument("second", metavar="B", help="weight 1")
    interpolate.add_argument("--weight", type=float, default=0.5, help="where on the line (default: %(default)s)")
    interpolate.add_argument("--config", metavar="JSON", help="config.json of checkpoints that carry none")
    interpolate.add_argument("--out", metavar="DIR", required=True)
    _add_overwrite(interpolate)

    methods = add("methods", "every align, transport and merge method: options, defaults, data needs, reference")
    methods.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run_program() -> NoReturn:
    """`main` as a process: what the console script runs."""
    code = main()
    if code == INTERRUPTED:
        # What was half done is cleaned up. JAX, stopped in the middle of a compilation, can crash on its way out,
        # and the caller must see the code of an interrupt and not that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    prepare_process()
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's word; what is half done is cleaned up
        module = importlib.import_module(f"jaxtune.commands.{arguments.command}")
        module.run(arguments)
    except JaxtuneError as error:
        print(f"jaxtune {arguments.command}: {error}", file=sys.stderr)
        return YOURS
    except KeyboardInterrupt:
        print(f"jaxtune {arguments.command}: interrupted; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return DONE
    except Exception:
        traceback.print_exc()
        print(f"jaxtune {arguments.command}: this is a fault of jaxtune {__version__}, not yours.", file=sys.stderr)
        return OURS
    return DONE


def prepare_process() -> None:
    """What has to be said before NumPy loads: one thread for LAPACK, and freed memory goes back to the system."""
    # Small batched factorisations gain nothing from threads, and lose a factor of a hundred where cores are busy.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return  # somebody knows better
    # glibc keeps what is freed, by default in arenas for every few threads: a tenth of the peak of an alignment.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems have no such call, and need none
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, 8 * 2**20)  # a leaf of a ViT-B; at 4 MiB the time goes up by a tenth


def _seed(text):
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"expected 0 to {2**32 - 1}, got {text}")
    return seed


def _interrupt(number, frame):
    raise KeyboardInterrupt


def _add_common(command):
    command.add_argument("--out", metavar="DIR", help="where the result goes")
    command.add_argument("--seed", type=_seed, default=0, help="of every random choice (default: %(default)s)")
    command.add_argument("--config", metavar="JSON", help="config.json of checkpoints that carry none")
    command.add_argument(
        "-o", "--option", metavar="NAME=VALUE", action="append", default=[], help="an option of the method; repeatable"
    )
    _add_overwrite(command)


def _add_overwrite(command):
    command.add_argument("--overwrite", action="store_true", help="replace an earlier result at --out")


if __name__ == "__main__":
    run_program()
