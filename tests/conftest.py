"""Settings shared by every test: one thread, so that results repeat and the suite is a good neighbour; what is slow."""

import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

SLOW = (
    r"tests/kernels/triton/",  # kernels that are compiled, and run by the simulator
    r"tests/benchmarks/test_(aot|counts)\.py",  # kernels that are compiled for every target
    r"::test_\w*(compile|opcheck|kernels_write)",  # graphs of torch.compile
    r"tests/scfg_fast/test_community\.py::test_(the_command|loaded_by)",  # processes, and whole pipelines
    r"\[triton-",
)
"""Parts of the names of tests that are marked `slow`, which `make check` leaves out; others wear it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = re.compile("|".join(SLOW))
    for item in items:
        if slow.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def rng() -> torch.Generator:
    """A fresh generator with a fixed seed; tests draw every random number from one."""
    return torch.Generator().manual_seed(20240331)
