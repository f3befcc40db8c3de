"""Training on the GPU: what is outside the core stays, bit for bit, and losses go down."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maskedtrain import SubNetwork, Trainer
from maskedtrain.methods import ATS
from maskedtrain.models import resnet8
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from tests.gpu.toolbox import DEVICE

pytestmark = pytest.mark.gpu

OPTIMIZERS = {
    "sgd": lambda parameters: MaskedSGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda parameters: MaskedAdamW(parameters, lr=2e-3),
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ats(name: str, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = resnet8(width=16).to(DEVICE)
    full, core = SubNetwork.full(model), SubNetwork.width(model, 0.5)
    optimizer = OPTIMIZERS[name](model.parameters())
    trainer = Trainer(model, ATS([full, core]), optimizer, F.cross_entropy, autocast=autocast)
    batch = torch.randn(16, 3, 8, 8, device=DEVICE), torch.arange(16, device=DEVICE) % 10
    losses: list[float] = []
    for step in range(8):
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        report = trainer.train_step(iter([batch]))
        losses += [float(loss) for loss in report.losses.values()]
        if step % 2 == 0:
            continue
        for key, parameter in model.named_parameters():
            mask = core.mask_of(parameter)
            outside = torch.ones_like(parameter, dtype=torch.bool)
            if mask is not None:
                outside = ~mask.dense(parameter.shape, parameter.device)
            assert torch.equal(parameter.detach()[outside], before[key][outside]), key
    assert losses[-2] < losses[0] and losses[-1] < losses[1]
