# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# a process for every core; the tests of a file stay together, because they share what they built
IN_PARALLEL := -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all test-oldest test-newest lint shapes setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/moesaic demo

test: lint shapes
	$(BIN)/pytest $(IN_PARALLEL)

test-all: lint shapes
	$(BIN)/pytest $(IN_PARALLEL) -m ""

# Shape annotations are executed here and only here: jaxtyping and beartype do not survive torch.compile.
SHAPED := moesaic.rules,moesaic.engine,moesaic.layer
shapes: setup
	$(BIN)/pytest $(IN_PARALLEL) -q -p no:cacheprovider --jaxtyping-packages=$(SHAPED),beartype.beartype \
		-m "not slow and not compile" \
		tests/test_rules.py tests/test_router.py tests/test_engines.py tests/test_moe.py tests/test_balance.py tests/test_losses.py

# Both ends of what pyproject.toml admits, each in an environment of its own. They take torch as pip finds it, which
# may be 6 GB with CUDA.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/pytest -p no:cacheprovider $(IN_PARALLEL) $(TRITON_3_6)

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev,train]'
	.venv-newest/bin/pytest -p no:cacheprovider $(IN_PARALLEL)

# its interpreter makes scalars of arrays, which numpy deprecates
TRITON_3_6 := -W 'ignore:Conversion of an array with ndim:DeprecationWarning'

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev,train]'
	touch $@

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
	rm -rf $(VENV) .venv-oldest .venv-newest dist moesaic-demo
