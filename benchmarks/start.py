"""How long the program takes to start.

    python benchmarks/start.py [--repeats 5]

Measured 2026-11-21 on two CPU cores, background work paused; medians of 5, seconds: import 0.025, help 0.039.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "load": round(os.getloadavg()[0], 1)}))
    for name, command in (("import", ["-c", "import jaxtune"]), ("help", ["-m", "jaxtune", "--help"])):
        seconds = []
        for _ in range(arguments.repeats + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
        warm = seconds[1:]
        print(json.dumps({"row": name, "median_s": round(float(np.median(warm)), 4), "min_s": round(min(warm), 4)}))


if __name__ == "__main__":
    main()
