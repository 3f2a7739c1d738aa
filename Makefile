# `make demo` and `make test` set themselves up: a virtual environment in .venv with the pinned requirements.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/ready
	$(BIN)/python ddpm.py --dataset gmm

HALF = ddim ddpm ebm flows gan igpt pixels pointflows run vae       # about half of the suite's time: two processes, a thread each
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

test: .venv/ready lint
	@log=$$(mktemp); $(PYTEST) $(HALF:%=tests/test_%.py) > $$log 2>&1 & half=$$!; \
	$(PYTEST) $(HALF:%=--ignore=tests/test_%.py); status=$$?; \
	wait $$half || status=1; cat $$log; rm $$log; exit $$status

lint: .venv/ready
	$(BIN)/ruff check .

bench: .venv/ready
	$(BIN)/python -m kernels.bench

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache results
