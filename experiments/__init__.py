"""Runs that a config describes: `python -m experiments.<name> --config=configs/<file>.py --workdir=DIR`."""
