"""Exported programs, where the command line's tests do not reach."""

from __future__ import annotations

from pathlib import Path

import torch

from maskedtrain.models import resnet8
from maskedtrain.training.export import save_program
from tests.train.toolbox import noise


@torch.no_grad()
def test_a_channels_last_network_is_exported_as_it_is_and_without_a_warning(tmp_path: Path) -> None:
    network = resnet8(width=8).eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    batch = torch.export.Dim("batch")
    save_program(network, (noise(2, 3, 8, 8),), ({0: batch},), tmp_path / "network.pt2")
    assert network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    program = torch.export.load(tmp_path / "network.pt2").module()
    images = noise(5, 3, 8, 8)
    # Another layout, another order of the sums in each convolution: some units of fp32 rounding.
    torch.testing.assert_close(program(images), network(images), rtol=1e-5, atol=1e-5)
