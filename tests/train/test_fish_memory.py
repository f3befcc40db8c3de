"""What a fine-tuning step of ``FishMask`` holds: parameters, activations, 20 bytes an element."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from maskedtrain.methods.fish import FishMask
from maskedtrain.models.text_classifier import TextClassifier
from maskedtrain.optim import MaskedAdamW

VOCAB, CLASSES, BATCH, LENGTH = 2000, 2, 16, 24
# The element, its gradient, two moments of AdamW, its position.
BYTES = 4 + 4 + 8 + 4


def encoder() -> TextClassifier:
    torch.manual_seed(0)
    return TextClassifier(VOCAB, CLASSES, d_model=64, ffn=256, heads=2, encoder_layers=3)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(4, VOCAB, (BATCH, LENGTH), generator=generator)
        yield tokens, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def peak_of(work: Callable[[], object], tmp_path: Path) -> int:
    """Largest number of bytes that torch holds at once on the CPU of what it allocates within."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert events
    return peak


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Of different storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def step_bytes(model: nn.Module, method: Any, optimizer: Any, tmp_path: Path) -> int:
    """Peak of a training step whose optimizer has its state: all that is held beside the code."""
    stream = batches()

    def step() -> None:
        tokens, labels = next(stream)
        plan = method.plan(0)
        plan.backward(lambda: F.cross_entropy(model(tokens), labels))
        optimizer.step(plan.update)
        optimizer.zero_grad()

    for _ in range(2):
        step()
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    standing = held_bytes([*model.parameters(), *model.buffers(), *state])
    return standing + peak_of(step, tmp_path)


def activation_bytes(model: nn.Module, tmp_path: Path) -> int:
    """Peak of forward and backward beside parameters, without a gradient of any matrix: what
    training the model keeps for the backward, and what goes through it.
    """
    tokens, labels = next(batches())
    vectors = [p for p in model.parameters() if p.ndim == 1]

    def passes() -> None:
        F.cross_entropy(model(tokens), labels).backward(inputs=vectors)
        model.zero_grad()

    passes()
    return peak_of(passes, tmp_path)


@pytest.fixture
def plain(tmp_path: Path) -> tuple[TextClassifier, int]:
    """A model, and the bytes of its parameters and activations."""
    model = encoder()
    return model, held_bytes(model.parameters()) + activation_bytes(model, tmp_path)


@pytest.mark.parametrize("ratio", [0.02, 0.1])
def test_a_packed_step_takes_20_bytes_an_element(
    ratio: float, plain: tuple[TextClassifier, int], tmp_path: Path
) -> None:
    model, without = plain
    method = FishMask(model, ratio, examples=16)
    method.prepare(batches())
    optimizer = MaskedAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    beside = step_bytes(model, method, optimizer, tmp_path) - without
    # No less than what stands between steps: all but the gradients.
    assert (BYTES - 4 - 4) * method.budget < beside <= BYTES * method.budget


def test_masks_on_whole_parameters_take_that_of_training_all(
    plain: tuple[TextClassifier, int], tmp_path: Path
) -> None:
    """What the bound above tells from: two moments and a gradient of every element."""
    model, without = plain
    count = sum(parameter.numel() for parameter in model.parameters())
    method = FishMask(model, 0.02, examples=16, packed=False)
    method.prepare(batches())
    optimizer = MaskedAdamW(model.parameters(), lr=1e-3)
    assert (
        step_bytes(model, method, optimizer, tmp_path) - without > 7 * count > BYTES * method.budget
    )


def test_no_gradient_of_a_matrix_is_formed(plain: tuple[TextClassifier, int]) -> None:
    """What a backward newly makes has no matrix's number of elements."""
    model, _ = plain
    method = FishMask(model, 0.02, examples=16)
    method.prepare(batches())
    matrices = [b for b in model.buffers() if b.ndim == 2 and b.is_floating_point()]
    held = {b.untyped_storage().data_ptr() for b in matrices}
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
                made.append(out.numel())
            return out

    tokens, labels = next(batches())
    with Watch():
        method.plan(0).backward(lambda: F.cross_entropy(model(tokens), labels))
    assert len(made) > 100 and {b.numel() for b in matrices}.isdisjoint(made)


def test_scoring_takes_two_copies_of_the_parameters(
    plain: tuple[TextClassifier, int], tmp_path: Path
) -> None:
    model, _ = plain
    size, passes = held_bytes(model.parameters()), activation_bytes(model, tmp_path)
    method = FishMask(model, 0.02, examples=16)
    assert peak_of(lambda: method.prepare(batches()), tmp_path) < 2.1 * size + passes
