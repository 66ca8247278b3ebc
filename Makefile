# Everything one runs here. Each target makes the virtual environment it needs; nothing has to be installed first but Python.
# GNU make 3.81 (macOS) is enough.

VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
# Two test processes share the cores: an OpenMP thread that spins long while it waits keeps the other from working. The quick tests'
# models are so small that a second thread only makes them wait. tests/conftest.py puts the files in order: the longest come first.
PYTEST = GOMP_SPINCOUNT=2000 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
QUICK = OMP_NUM_THREADS=1 $(PYTEST) -m "not long" --hypothesis-profile repeatable

# Where plain pip would fetch gigabytes of CUDA for a machine that has no NVIDIA driver. macOS wheels have none anyway.
CPU_WHEELS = https://download.pytorch.org/whl/cpu
WANTS_CPU = [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1

.PHONY: help demo demo-serve demo-base test test-all check format docs boards lock bench chaos clean

help:
	@echo "make demo       fine-tune a small model on this machine and see what it learnt (minutes, no GPU, no network once installed)"
	@echo "make demo-serve export it, verify it, serve it, promote a second version and take it back, while clients go on asking"
	@echo "make test       the quick tests          make test-all   all tests"
	@echo "make check      format, lint, types, quick tests"
	@echo "make format     put the code into shape  make docs       write the generated reference pages"
	@echo "make boards     write Grafana's dashboards from their description"
	@echo "make lock       write the versions of all packages that images hold"
	@echo "make demo-base  make the demo's base model again, from nothing"
	@echo "make bench      measure this and its peers on this machine (hours; BENCH=--quick: minutes, and only whether all works)"
	@echo "make chaos      put faults into real trainings, and see that each comes to what an undisturbed one does (an hour; as root: all)"
	@echo "make clean      remove the environment and the caches; runs are kept"

demo: $(VENV)/.installed
	@$(BIN)/python examples/demo/demo.py

demo-serve: $(VENV)/.installed-serve
	@$(BIN)/python examples/demo/serving.py

demo-base: $(VENV)/.installed
	$(BIN)/python examples/demo/make_base.py

test: $(VENV)/.installed-dev
	$(QUICK)

test-all: $(VENV)/.installed-all
	$(PYTEST)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(QUICK)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

boards: $(VENV)/.installed-dev
	$(BIN)/python -m tunedock.launch.boards.write

lock: $(VENV)/.installed-dev
	$(BIN)/python -m tunedock.image.lock

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run $(BENCH)

chaos: $(VENV)/.installed
	$(BIN)/python -m benchmarks.chaos $(CHAOS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist examples/demo/base-config examples/demo/corpus.jsonl
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "tunedock needs Python 3.11 or newer with venv; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environment; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@touch $@

# torch comes first and alone, so that only it is looked for among the CPU wheels. Where they cannot be reached, pip's configured
# index decides.
$(VENV)/.torch: constraints.txt $(VENV)/.python
	@echo "installing torch into $(VENV)"
	@if $(WANTS_CPU); then \
		$(PIP) install --no-deps --retries 1 --timeout 20 --extra-index-url $(CPU_WHEELS) -c constraints.txt torch \
		|| $(PIP) install --no-deps -c constraints.txt torch; \
	else $(PIP) install --no-deps -c constraints.txt torch; fi
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing tunedock into $(VENV)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	@echo "installing what serving needs into $(VENV); llama.cpp is compiled: some minutes, and a C++ compiler"
	@$(PIP) install -c constraints.txt -e '.[serve,models,llama-cpp]' openai
	@touch $@

# The quick tests leave out what asks llama.cpp where it is not installed; all tests never do.
$(VENV)/.installed-all: $(VENV)/.installed-dev
	@echo "compiling llama.cpp into $(VENV): some minutes, and a C++ compiler"
	@$(PIP) install -c constraints.txt -e '.[dev,llama-cpp]'
	@touch $@
