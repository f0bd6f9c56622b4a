"""Settings shared by every test: one thread, so that results repeat and the suite is a good neighbour."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    """A fresh generator with a fixed seed; tests draw every random number from one."""
    return torch.Generator().manual_seed(20240331)
