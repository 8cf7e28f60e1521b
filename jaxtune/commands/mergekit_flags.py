"""Options of `mergekit-yaml` beside ours: its users change the first word of their command line and nothing else."""

import argparse
import os
import sys

from jaxtune.errors import ConfigError

# On and off ("--no-..." too) -> what is said of it where it is given; None: what it asks for is so anyway.
SWITCHES = {
    "lazy-unpickle": None,
    "low-cpu-memory": None,
    "read-to-gpu": None,
    "multi-gpu": None,
    "async-write": None,
    "clone-tensors": None,
    "quiet": None,
    "copy-tokenizer": None,
    "write-model-card": None,
    "safe-serialization": None,
    "trust-remote-code": "no code of a model is ever run",
    "allow-crimes": "what does not fit is refused; 'override_architecture' beside a model says what it is",
}
OFF = {
    "copy-tokenizer": "files of the tokenizer are written",
    "write-model-card": "README.md is written",
}
REFUSED = {
    "--unsafe-truncate-embeddings": "nothing is cut off: write tokenizer_source: base (or union) into the recipe.",
    "--no-safe-serialization": "models are written as safetensors and never pickled.",
}
VALUES = {
    "out-shard-size": "files are cut as the base's",
    "write-threads": None,
    "lora-merge-cache": None,
    "lora-merge-dtype": "adapters are merged in float32 or wider, and all is rounded once",
}
DEVICES = {"auto": "auto", "host": "host", "cpu": "host", "jax": "jax", "cuda": "jax", "gpu": "jax", "tpu": "jax"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Takes the options of `mergekit-yaml`; help does not list them."""
    hidden = {"help": argparse.SUPPRESS}
    for name in SWITCHES:
        parser.add_argument(f"--{name}", dest="flags", action="append_const", const=(name, True), **hidden)
        if f"--no-{name}" not in REFUSED:
            parser.add_argument(f"--no-{name}", dest="flags", action="append_const", const=(name, False), **hidden)
    for option in REFUSED:
        parser.add_argument(option, dest="flags", action="append_const", const=(option, None), **hidden)
    parser.add_argument("--no-unsafe-truncate-embeddings", action="store_true", **hidden)
    for name in VALUES:
        parser.add_argument(f"--{name}", **hidden)
    parser.add_argument("--cuda", "--gpu-rich", dest="device", action="store_const", const="jax", **hidden)
    parser.add_argument("--no-cuda", dest="device", action="store_const", const="host", **hidden)
    parser.add_argument("--num-threads", "-j", dest="threads", type=int, **hidden)
    parser.add_argument("--transformers-cache", metavar="DIR", **hidden)
    parser.add_argument("-v", action="count", **hidden)


def parse_device(text: str) -> str:
    """ "cpu", "cuda:0", ... -> one of ours."""
    device = DEVICES.get(text.partition(":")[0])
    if device is None:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}. Known: {', '.join(DEVICES)}")
    return device


def apply_flags(arguments: argparse.Namespace) -> None:
    """Says which of them have no effect here, and does what the others ask for.

    Raises:
        ConfigError: one that asks for what is not done here.
    """
    notes = []
    for name, is_on in arguments.flags or ():
        if is_on is None:
            raise ConfigError(f"{name} is not done here: {REFUSED[name]}")
        said = SWITCHES[name] if is_on else OFF.get(name)
        if said:
            notes.append(f"--{'' if is_on else 'no-'}{name} has no effect: {said}.")
    for name, said in VALUES.items():
        if said and getattr(arguments, name.replace("-", "_")) is not None:
            notes.append(f"--{name} has no effect: {said}.")
    for note in dict.fromkeys(notes):
        print(f"jaxtune merge: {note}", file=sys.stderr)
    if arguments.transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = arguments.transformers_cache
