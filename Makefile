# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# a process for every core; the tests of a file stay together, because they share what they built
IN_PARALLEL := -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all lint shapes setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/moesaic demo

test: lint shapes
	$(BIN)/pytest $(IN_PARALLEL)

test-all: lint shapes
	$(BIN)/pytest $(IN_PARALLEL) -m ""

# Shape annotations are executed here and only here: jaxtyping and beartype do not survive torch.compile.
SHAPED := moesaic.types,moesaic.rules,moesaic.engine,moesaic.layer
shapes: setup
	$(BIN)/pytest -q -p no:cacheprovider --jaxtyping-packages=$(SHAPED),beartype.beartype -m "not slow and not compile" \
		tests/test_rules.py tests/test_router.py tests/test_engines.py tests/test_moe.py tests/test_balance.py tests/test_losses.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,train]'
	touch $@

clean:
	rm -rf $(VENV) dist moesaic-demo
