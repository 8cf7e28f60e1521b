# `make demo` and `make test` do all set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/jaxtune demo --out runs/demo --overwrite

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp per set of packages: the second run starts at once, a change of setup.py installs again.
$(VENV)/.demo: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -e '.[report]'
	touch $@

$(VENV)/.dev: setup.py $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	# Oracles of the tests whose networks need no torchvision, which would bring a torch of its own.
	$(BIN)/python -m pip install --quiet --no-deps timm==1.0.31 open_clip_torch==3.3.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
