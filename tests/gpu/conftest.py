"""What needs a CUDA device: ``make gpu``, or ``pytest -m gpu tests/gpu``.

``PARTIAL_KERNELS_DRY_RUN=1`` runs it on the CPU, on the reference backends and on few cases: it
shows that the tests can be run, and nothing of the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when cuBLAS is first used: without it, deterministic mode warns of every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.gpu.toolbox import DRY_RUN


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Skips without a device; afterwards its memory is free for other processes."""
    if DRY_RUN:
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield
    if torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()
