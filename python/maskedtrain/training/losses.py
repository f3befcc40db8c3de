"""Losses: means over the targets that count."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy"]


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with labels smoothed over the wrong classes, in nats::

        (1 - e) * -log p[target] + e / (C - 1) * sum over the others of -log p[c]

    Args:
        logits: ``[..., C]``.
        targets: int64 ``[...]``; -100 does not count.
        smoothing: e, in [0, 1).

    Returns:
        The mean over the targets that count.

    Source: fairseq's label_smoothed_cross_entropy; Szegedy et al. 2016 spread e over all C classes,
    as torch's ``label_smoothing`` does, which makes the two differ by a factor C / (C - 1) of e.
    """
    classes = logits.shape[-1]
    spread = smoothing * classes / (classes - 1) if smoothing else 0.0
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=spread)
