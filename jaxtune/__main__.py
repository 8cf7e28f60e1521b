"""`python -m jaxtune` is the program `jaxtune`."""

from jaxtune.cli import run_program

run_program()
