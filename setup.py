"""Package definition; everything a user needs to know about it stands in README.md."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "jaxtune" / "version.py").read_text().splitlines()
    if line.startswith("__version__")
)

TEXT = ["tokenizers>=0.20"]  # reads the tokenizer.json beside a model, for texts that it is to learn on
REPORT = ["matplotlib>=3.8", "tensorboardX>=2.6.2"]
# What parity with other libraries is tested against; nothing of ours imports them. One version of torch, so that an
# index of CPU builds can decide which build it is.
ORACLES = ["torch==2.13.0", "transformers>=5.0", "peft>=0.17", "mergekit==0.1.5"]
TFDS = ["tensorflow-datasets>=4.9.7", "grain>=0.2.7"]

setup(
    name="jaxtune",
    version=version,
    description="Carry a fine-tune to a new base model without retraining; merge, interpolate and measure weights.",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxtune", "jaxtune.*"]),
    package_data={"jaxtune": ["assets/*", "assets/**/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "scipy>=1.13",
        "PyYAML>=6",
    ],
    extras_require={
        "report": REPORT,
        "text": TEXT,
        "tfds": TFDS,
        "dev": [
            *REPORT,
            *TEXT,
            *TFDS,
            *ORACLES,
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "safetensors>=0.5",
            "scikit-learn>=1.5",
        ],
    },
    entry_points={"console_scripts": ["jaxtune=jaxtune.cli:run_program"]},
)
