# make setup      a virtual environment in .venv with the pinned dependencies (a second call costs a second)
# make run        the main job: configs/demo.yaml, its report in runs/demo
# make lint       ruff over everything, mypy over the rooms of pure functions (solvers, selection, masks, indicators)
# make test       the default tests
# make test-slow  the tests that take minutes
# make bench      every benchmark but reward_indicator (which reads finished runs), results in runs/bench
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: setup run lint test test-slow bench

setup: $(STAMP)

# torch first and alone: its exact version decides which build comes, before any range is resolved.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mama_trl needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,peft,deepspeed]'
	touch $(STAMP)

run: setup
	$(VENV)/bin/mama run configs/demo.yaml

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: setup
	$(VENV)/bin/python -m pytest

test-slow: setup
	$(VENV)/bin/python -m pytest -m slow

bench: setup
	mkdir -p runs/bench
	for name in selection overhead layer_error oneshot structures budget_trust offload; do \
		$(VENV)/bin/python -m benchmarks.$$name --output runs/bench/$$name.json || exit 1; \
	done
