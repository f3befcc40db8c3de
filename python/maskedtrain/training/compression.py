"""Less to send in data-parallel training: gradients' largest elements, the others remembered."""

# No annotations from __future__: DistributedDataParallel compares a hook's with the types.
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from maskedtrain.layers.topk import kept_count
from maskedtrain.methods.error_feedback import Memory
from partial_kernels import topk_select

__all__ = ["TopKErrorFeedback", "topk_error_feedback_hook"]


class TopKErrorFeedback:
    """What one of n workers keeps for ``topk_error_feedback_hook``.

    ``bytes_sent`` counts the values and positions that this worker has sent, to each of the n - 1
    others. The memory, one buffer of the model's size, is the worker's own: each has to save and
    load its own state.

    Args:
        k: an int is how many elements of a bucket a worker sends, a float in (0, 1] their share;
            the same on all workers.
        process_group: that of the ``DistributedDataParallel``; the default one where not given.

    Raises:
        ValueError: k is neither.
    """

    def __init__(self, k: int | float, process_group: dist.ProcessGroup | None = None) -> None:
        kept_count(k, 1)
        self.k, self.process_group = k, process_group
        self.bytes_sent = 0
        self._memory = Memory()

    def scale_memory(self, factor: float) -> None:
        """Multiply the memory, for a learning rate that changes: by the one before over the one
        after (see ``ErrorFeedback``).
        """
        self._memory.scale(factor)

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """What training goes on from bit for bit, by the names of the model's parameters."""
        return {"memory": self._memory.state_dict(model), "bytes_sent": self.bytes_sent}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; ValueError if it does not fit the model."""
        if set(state) != {"memory", "bytes_sent"}:
            raise ValueError(f"the state must hold memory and bytes_sent, got {sorted(state)}")
        self._memory.load_state_dict(model, state["memory"])
        self.bytes_sent = state["bytes_sent"]


@torch.no_grad()
def topk_error_feedback_hook(
    state: TopKErrorFeedback,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> Future[Tensor]:
    """Communication hook of ``DistributedDataParallel``: the mean of the n workers' k largest
    elements of memory and gradient, in each bucket::

        c_i = top-k(e_i + g_i),    e_i <- e_i + g_i - c_i,    g = (1 / n) sum_i c_i

    One all-gather of k values and k positions (4 bytes each below 2^31 elements) takes the place
    of the all-reduce of the bucket's d elements. With v bytes a value, a worker sends
    ``(n - 1) k (v + 4)`` bytes, and would ``(n - 1) 2 d v / n`` in a ring's all-reduce: less where
    ``k / d < 2 v / (n (v + 4))``, which is 1 / n in fp32. Every worker adds the c_i up in the same
    order: replicas stay equal bit for bit. Sums are fp32 (fp64 for fp64), rounded to the gradient's
    dtype at the end; what c_i loses by rounding stays in e_i.

    Every parameter must be part of every backward pass: with ``find_unused_parameters`` what is
    sent of an unused one is lost.

    Source: Stich et al., "Sparsified SGD with Memory" (NeurIPS 2018), of n workers as in
    Alistarh et al., "The Convergence of Sparsified Gradient Methods" (NeurIPS 2018).

    Example:
        >>> ddp.register_comm_hook(TopKErrorFeedback(0.01), topk_error_feedback_hook)
    """
    gradient = bucket.buffer()
    # By parameter: DistributedDataParallel forms other buckets after the first step.
    held = [_in_memory_order(state._memory[parameter]) for parameter in bucket.parameters()]
    total = torch.cat(held).add_(gradient)
    index = topk_select(total, kept_count(state.k, len(total)))
    values = total[index].to(gradient.dtype)
    # Not set to 0: what was rounded off stays.
    total[index] -= values
    for part, rest in zip(held, total.split([len(part) for part in held]), strict=True):
        part.copy_(rest)

    sent = [values, index.to(torch.int32 if len(total) <= 2**31 else torch.int64)]
    message = torch.cat([part.view(torch.uint8) for part in sent])
    workers = dist.get_world_size(state.process_group)
    state.bytes_sent += len(message) * (workers - 1)
    received = [torch.empty_like(message) for _ in range(workers)]
    work = dist.all_gather(received, message, group=state.process_group, async_op=True)

    def mean(_: Future[Any]) -> Tensor:
        found = torch.zeros_like(total)
        # One worker after the other: positions that two of them sent would race on a GPU.
        for message in received:
            if message.is_cuda:
                # The stream of callbacks is not the one that this was allocated on.
                message.record_stream(torch.cuda.current_stream(message.device))
            values, index = _parts(message, sent)
            found.index_add_(0, index, values.to(found.dtype))
        return gradient.copy_(found.div_(workers))

    return cast("dist.Work", work).get_future().then(mean)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory, which is their order in a bucket."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _parts(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, of these lengths and dtypes, whose bytes a message is."""
    parts = message.split([tensor.nbytes for tensor in like])
    # Copies: what is viewed as another dtype must begin at a multiple of its size.
    return [part.clone().view(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]
