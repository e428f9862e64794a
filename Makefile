# One command each; demo and test set everything up themselves, and start at once the second time.

PYTHON ?= python3
ARGS ?=
# Many tests wait for other processes, so two of them share a core.
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores > 3 ? 8 : 2 * cores)))
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS := .venv/.docs
# Some images set this; hundreds of processes would then compile the same modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-parts check bench arm64 docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## /{printf "make %-7s %s\n", $$1, $$2}' Makefile

$(INSTALLED): pyproject.toml scripts/bootstrap.py
	@$(PYTHON) scripts/bootstrap.py

demo: $(INSTALLED)  ## Run the whole fleet on this machine and watch it answer (ARGS="--prompt ...")
	@$(BIN)/fleet demo $(ARGS)

test: test-parts  ## Run all tests in JOBS processes, two a core unless given (ARGS="-k ...")
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-parts: $(INSTALLED)
	@scripts/install_mosquitto.sh
	@scripts/install_postgresql.sh
	@scripts/install_systemd.sh
	@scripts/install_chromium.sh
	@echo "==> the default model's bundle: fetched and built if it is missing"
	@$(BIN)/python -c "from onnx_export.default_bundle import default_bundle; print(default_bundle(print))"

check: $(INSTALLED)  ## Lint, format, types, import rules
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/measure_code.py

bench: $(INSTALLED)  ## Measure the edge engine beside its peers, on an idle machine (ARGS="--only speed ...")
	@$(BIN)/fleet bench edge $(ARGS)

arm64: $(INSTALLED)  ## Compare a device on an emulated ARM processor with this machine (ARGS="--cpu ...")
	@scripts/install_arm64.sh
	@$(BIN)/python scripts/arm64.py $(ARGS)

$(DOCS): $(INSTALLED)
	@echo "==> installing the tools of the documentation site"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

docs: $(DOCS)  ## Build the documentation site into site/; a broken link fails
	@$(BIN)/python scripts/build_docs.py

clean:  ## Remove what was built here; the model's bundle in the user's cache stays
	rm -rf .venv dist build site .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
