"""`python -m jaxtune` is the program `jaxtune`."""

import sys

from jaxtune.cli import main

sys.exit(main())
