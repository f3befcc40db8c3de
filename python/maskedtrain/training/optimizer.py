"""Optimizer and learning rate of a run."""

from __future__ import annotations

from torch import nn
from torch.optim import lr_scheduler

from maskedtrain.config import OptimConfig
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.optim.base import MaskedOptimizer

__all__ = ["make_optimizer"]


def make_optimizer(
    options: OptimConfig, model: nn.Module, total: int
) -> tuple[MaskedOptimizer, lr_scheduler.LRScheduler]:
    """The optimizer, and its learning rate over ``total`` steps."""
    parameters = list(model.parameters())
    if options.optimizer == "sgd":
        optimizer = MaskedSGD(
            parameters,
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
    else:
        optimizer = MaskedAdamW(
            parameters,
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
    if options.schedule == "inverse_sqrt":
        return optimizer, lr_scheduler.LambdaLR(optimizer, _InverseSqrt(options))
    warmup = min(options.warmup_steps, total - 1)
    rest = total - warmup
    if options.schedule == "cosine":
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, rest)
    elif options.schedule == "multistep":
        at = [round(share * total) - warmup for share in options.milestones]
        schedule = lr_scheduler.MultiStepLR(optimizer, at)
    else:
        schedule = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if warmup:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        schedule = lr_scheduler.SequentialLR(optimizer, [rise, schedule], [warmup])
    return optimizer, schedule


class _InverseSqrt:
    """Factor of the peak learning rate after ``t`` steps::

        (lr0 + (lr - lr0) t / w) / lr   for t < w = warmup_steps, lr0 = warmup_init_lr
        sqrt(w / t)                     from there on

    Source: fairseq's inverse_sqrt; Vaswani et al. 2017, section 5.3.
    """

    def __init__(self, options: OptimConfig) -> None:
        self.warmup_steps = options.warmup_steps
        self.start = options.warmup_init_lr / options.lr if options.lr else 1.0

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start + (1 - self.start) * step / self.warmup_steps
        return (self.warmup_steps / step) ** 0.5
