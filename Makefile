# Two commands do everything on a fresh machine: `make demo` and `make test`. Needs Python >= 3.11, nothing else.
PYTHON ?= python3
VENV ?= .venv
# tests at a time; many of them start processes of their own
TESTS ?= 2
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-all test-engines test-gpu bench-gpu chaos fuzz lint env peer engines clean

demo: env ## the whole pipeline on the sample pool; look at runs/demo/index.html
	examples/emoji/run.sh

test: env ## the fast suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTS) --dist worksteal -m "not slow and not slurm and not ray"

test-all: env ## everything that this machine can run
	$(BIN)/python -m pytest

chaos: env ## a hundred faults to real training runs; the table of docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.soak --faults $(or $(FAULTS),100) --page docs/reliability.md

fuzz: env ## a million broken and hostile inputs to every reader
	-$(BIN)/python -m pip install --quiet -e ".[fuzz]" -c requirements/constraints.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.guided --runs $(or $(GUIDED),100000)
	FUZZ_INPUTS=$(or $(INPUTS),1000000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TESTS) --dist worksteal tests/fuzz

test-engines: env ## curation on a real SLURM and a real Ray of this machine, where they are installed
	$(BIN)/python -m pytest -m "slurm or ray"

test-gpu: env ## what needs a CUDA device; the other tests hide it from themselves
	CUDA_VISIBLE_DEVICES=$(or $(CUDA_VISIBLE_DEVICES),0) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu

bench-gpu: peer ## the tables of benchmarks/results/*_gpu.md, on one GPU, with the peers beside
	.venv-peer/bin/python -m pip install --quiet --no-deps -r requirements/gpu_peers.txt
	.venv-peer/bin/python benchmarks/tiled_loss_gpu.py --out benchmarks/results/tiled_loss_gpu.md
	.venv-peer/bin/python benchmarks/cached_step_gpu.py --out benchmarks/results/cached_step_gpu.md
	.venv-peer/bin/python benchmarks/step.py --batch 512 --out benchmarks/results/step_gpu.md

lint: env ## style, and the floors of docs/architecture.md
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_floors.py

env: $(VENV)/.installed ## the virtual environment

$(VENV)/.installed: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c requirements/constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c requirements/constraints.txt
	touch $@

peer: ## open_clip in an environment of its own, for the tests marked `peer`
	requirements/install_peer.sh .venv-peer $(PYTHON)

engines: env ## SLURM (Debian, as root) and Ray, for `make test-engines`; what cannot be had is skipped there by name
	-$(BIN)/python -m pip install --quiet -e ".[ray]" -c requirements/constraints.txt
	-apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge

clean: ## remove what the commands above made, but not runs/
	rm -rf $(VENV) .venv-peer .pytest_cache .ruff_cache
