PYTHON ?= python

.PHONY: lint test test-twins test-ptx aot simulated tables bench bench-gpu overhead plot

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest

test-twins:
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest tests/kernels --ignore tests/kernels/triton

test-ptx:
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest tests/kernels/triton lab/ptxsim

aot:
	$(PYTHON) -m benchmarks.aot --check

simulated:
	$(PYTHON) -m benchmarks.simulated

tables:
	$(PYTHON) -m benchmarks.aot
	$(PYTHON) -m benchmarks.simulated
	$(PYTHON) -m benchmarks.agreement
	PYTHONPATH=.:kernels $(PYTHON) -m tests.benchmarks.attention_counters

bench-gpu:
	$(PYTHON) -m benchmarks.gpu

bench:
	$(PYTHON) -m benchmarks.verify
	$(PYTHON) -m benchmarks.run

overhead:
	$(PYTHON) -m benchmarks.overhead --arch sd15

plot:
	$(PYTHON) -m benchmarks.plot
