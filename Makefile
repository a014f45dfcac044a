# make install | test | check | matrix | faults | fuzz | quickstart | docs | dist.  Needs Python >= 3.10, git and a C compiler; installs everything else into .venv.
PYTHON ?= python3
BIN := .venv/bin
# The number of tests that run at the same time, with up to four processes of one thread each, which often wait.
WORKERS ?= 2
STAMP := .venv/.installed
# Where it is set, as in many images, every process that a test starts would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
# launch/local.yaml starts 2 processes, for the CPU; with GPUs, one process for each.
PROCESSES := $(if $(filter-out 0,$(GPUS)),--num_processes $(GPUS))

.PHONY: install test check matrix faults fuzz quickstart docs dist gpu format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "distopt needs Python >= 3.10, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[data,deepspeed,docs,finetune,sweep,dev]"
	touch $(STAMP)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=25

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

# The complete equivalence matrix, which updates its table in docs/equivalence.md, and all other tests; `make test` runs a part of
# both. One worker spends an hour on the search (tests/test_search.py), while the other runs the rest.
# The tests of a file stay together, since one process has to see all cells of the table.
matrix: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "matrix or not matrix" --table=docs/equivalence.md

# Every fault that docs/reliability.md lists: kills, restarts, hangs, ranks that differ, weights that are not finite.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "matrix or not matrix" $(wildcard $(addprefix tests/test_,$(addsuffix .py,run_lock agreement watchdog restart attempt stop train_nonfinite checkpoint_* machines best_checkpoint healing)))

# CASES random command lines and data files, beside those that were once wrong: each is a run, or one clear line.
CASES ?= 1500
SEED ?= 0
fuzz: install
	OMP_NUM_THREADS=1 DISTOPT_FUZZ_CASES=$(CASES) DISTOPT_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -s -m matrix tests/test_fuzz.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tests that need a GPU: equality, no synchronization, CUDA graphs, the share of the memory bandwidth.
gpu: install
	$(BIN)/python -m pytest -s -m gpu

# The pages of docs/ and the reference: build/docs/index.html.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

# The wheel and the sdist, for an index: dist/.
dist: install
	$(BIN)/python -m build --no-isolation --outdir dist

quickstart: install
	$(BIN)/accelerate launch --config_file launch/local.yaml $(PROCESSES) -m distopt.train experiment=quickstart

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache
