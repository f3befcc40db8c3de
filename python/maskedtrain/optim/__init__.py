"""Optimizers whose step can be restricted to a sub-network; otherwise they are torch.optim's."""

from maskedtrain.optim.adamw import MaskedAdamW
from maskedtrain.optim.sgd import MaskedSGD

__all__ = ["MaskedAdamW", "MaskedSGD"]
