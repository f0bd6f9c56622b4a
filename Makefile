PYTHON ?= python

.PHONY: check lint package test test-all test-twins test-ptx aot simulated tables bench bench-gpu overhead plot

# Under a minute on 2 cores: style, who imports whom, the torch implementations, every unit; nothing that compiles.
check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest -n0 -q -m "not slow" tests/project tests/scfg_fast tests/kernels

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# The source distribution, the wheel made from it, and what PyPI would say of both.
package:
	rm -rf dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*

test:
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest

# Also the simulator's own tests, for changes of lab/ptxsim and new versions of Triton.
test-all:
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest tests training lab

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

bench-gpu:
	$(PYTHON) -m benchmarks.gpu

bench:
	$(PYTHON) -m benchmarks.verify
	$(PYTHON) -m benchmarks.run

overhead:
	$(PYTHON) -m benchmarks.overhead --arch sd15

plot:
	$(PYTHON) -m benchmarks.plot
