# make run   install into .venv and run exp1 to exp5 on the built-in default
# make test  install into .venv and run every check
# TORCH_INDEX=…  where torch comes from, e.g. https://download.pytorch.org/whl/cpu for a machine without a GPU
PYTHON ?= python3
TORCH_INDEX ?=
# --no-compile: pip would compile all of torch, for minutes; what a run imports is compiled once, and kept
BIN := .venv/bin
INSTALLED := .venv/.installed
IMPORTED := datasets, kedro.framework.cli.cli, matplotlib.pyplot, scipy.stats, torch._dynamo, vlm_latency.molmo.modeling
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test viz clean

run: $(INSTALLED)
	$(BIN)/kedro run

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry src
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile

viz: $(INSTALLED)
	$(BIN)/kedro viz run

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/python -m compileall -q src
	$(BIN)/python -c "import $(IMPORTED)"
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
