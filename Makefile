PYTHON ?= python

.PHONY: lint test bench overhead plot

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest

bench:
	$(PYTHON) -m benchmarks.verify
	$(PYTHON) -m benchmarks.run

overhead:
	$(PYTHON) -m benchmarks.overhead --arch sd15

plot:
	$(PYTHON) -m benchmarks.plot
