"""Shared by every test."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

# Tables that a user has tuned would change what "auto" takes.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="maskedtrain-config-")

# A first example pays for lazy imports and compilation; time limits are the runner's business.
# A run is the same as the one before, so that what fails is what was changed; to look for more,
# --hypothesis-profile explore --seed N.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="torch's seed at the start of each test")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """The same random numbers for a test alone and after others."""
    torch.manual_seed(request.config.getoption("--seed"))


def ieee_sqrt(tensor: Tensor) -> Tensor:
    """The square root that IEEE 754 asks for."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(tensor.numpy())))


@pytest.fixture
def correct_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor.sqrt rounded correctly: in torch with MKL it is off by one unit now and then."""
    monkeypatch.setattr(Tensor, "sqrt", ieee_sqrt)
