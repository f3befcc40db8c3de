"""``topk_error_feedback_hook`` between two processes, against the formula in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maskedtrain.training.compression import TopKErrorFeedback, topk_error_feedback_hook

ROOT = Path(__file__).parents[2]
WORKERS, STEPS, LR = 2, 6, 0.1
SHARE = 0.1


def network(dtype: torch.dtype = torch.float64, layout: Any = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(45, 7))
    return model.to(dtype).to(memory_format=layout)


D = 3 * 5 * 4 + 5 + 45 * 7 + 7


def loss_of(model: nn.Module, worker: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(WORKERS * step + worker)
    x = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)
    return model(x.to(next(model.parameters()).dtype)).square().mean()


# What a worker does


class Recorded:
    """Training of one worker: its gradients, what it updates by, and what it ends with."""

    def __init__(
        self, worker: int, k: float | None, model: nn.Module, group: Any = None, **options: Any
    ) -> None:
        self.worker, self.model = worker, model
        self.ddp = DistributedDataParallel(model, process_group=group, **options)
        self.state = None if k is None else TopKErrorFeedback(k, group)
        if self.state is not None:
            self.ddp.register_comm_hook(self.state, topk_error_feedback_hook)
        self.updates: list[dict[str, Tensor]] = []
        self.given = {n: torch.zeros_like(p).double() for n, p in model.named_parameters()}

    def train(self, steps: range) -> Recorded:
        named = dict(self.model.named_parameters())
        for step in steps:
            own = torch.autograd.grad(loss_of(self.model, self.worker, step), list(named.values()))
            loss_of(self.ddp, self.worker, step).backward()
            self.updates.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
            with torch.no_grad():
                for (name, update), grad in zip(self.updates[-1].items(), own, strict=True):
                    self.given[name] += grad
                    named[name] -= LR * update
            self.model.zero_grad()
        return self

    def found(self) -> dict[str, Any]:
        state = None if self.state is None else self.state.state_dict(self.model)
        weights = self.model.state_dict()
        return {"given": self.given, "updates": self.updates, "weights": weights, "state": state}


def work(worker: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=worker, world_size=WORKERS
    )
    alone = [dist.new_group([i]) for i in range(WORKERS)][worker]
    every = range(STEPS)
    last = torch.channels_last
    runs: dict[str, Recorded] = {
        "all-reduce": Recorded(worker, None, network(torch.float32)).train(every),
        "all": Recorded(worker, 1.0, network(torch.float32)).train(every),
        "share": Recorded(worker, SHARE, network()).train(every),
        "count": Recorded(worker, 3, network(torch.float32)).train(every),
        "channels-last": Recorded(worker, SHARE, network(layout=last)).train(every),
        # 200 bytes: several buckets, others after the first step.
        "buckets": Recorded(worker, SHARE, network(), bucket_cap_mb=2e-4).train(every),
        "views": Recorded(worker, SHARE, network(), gradient_as_bucket_view=True).train(every),
        # 39 values of 2 bytes: positions begin in the middle of 4 bytes.
        "bf16": Recorded(worker, SHARE, network(torch.bfloat16)).train(every),
        "alone": Recorded(worker, SHARE, network(torch.bfloat16), alone).train(every),
    }
    before = Recorded(worker, SHARE, network()).train(range(3))
    path = folder / f"state-{worker}.pt"
    torch.save(before.found(), path)
    saved = torch.load(path, weights_only=True)
    # Into another layout: a state is by name and position, whatever lies where in memory.
    for name, layout in (("resumed", torch.contiguous_format), ("relaid", last)):
        runs[name] = Recorded(worker, SHARE, network(layout=layout))
        runs[name].model.load_state_dict(saved["weights"])
        runs[name].state.load_state_dict(runs[name].model, saved["state"])  # pyright: ignore[reportOptionalMemberAccess]
        runs[name].train(range(3, STEPS))
    torch.save({name: run.found() for name, run in runs.items()}, folder / f"found-{worker}.pt")
    dist.destroy_process_group()


# What came of it


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By worker, by name of the run."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    folder = tmp_path_factory.mktemp("workers")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(worker), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for worker in range(WORKERS)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * WORKERS, "\n".join(outputs)
    return [torch.load(folder / f"found-{i}.pt", weights_only=True) for i in range(WORKERS)]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


class Formula:
    """``c_i = top-k(e_i + g_i)``, ``g = mean(c_i)``, of all elements as one bucket."""

    def __init__(self, count: int) -> None:
        self.model, self.count = network(), count
        self.memories = [torch.zeros(D, dtype=torch.float64) for _ in range(WORKERS)]
        self.means: list[Tensor] = []

    def train(self) -> Formula:
        parameters = list(self.model.parameters())
        for step in range(STEPS):
            total = torch.zeros(D, dtype=torch.float64)
            for worker, memory in enumerate(self.memories):
                g = torch.autograd.grad(loss_of(self.model, worker, step), parameters)
                memory += torch.cat([part.flatten() for part in g])
                top = memory.abs().argsort(descending=True)[: self.count]
                total[top] += memory[top]
                memory[top] = 0
            self.means.append(total / WORKERS)
            with torch.no_grad():
                parts = self.means[-1].split([p.numel() for p in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter -= LR * part.view_as(parameter)
        return self


@pytest.mark.parametrize("run", ["share", "channels-last", "views"])
def test_the_update_is_the_formula_in_one_process(found: list[dict[str, Any]], run: str) -> None:
    formula = Formula(round(SHARE * D)).train()
    for worker, runs in enumerate(found):
        for update, mean in zip(runs[run]["updates"], formula.means, strict=True):
            # fp64, of gradients whose sums another layout takes in another order.
            torch.testing.assert_close(flat(update), mean, rtol=1e-10, atol=1e-14)
        memory = flat(runs[run]["state"]["memory"])
        torch.testing.assert_close(memory, formula.memories[worker], rtol=1e-10, atol=1e-14)
    assert not torch.equal(*formula.memories)


@pytest.mark.parametrize("run", ["all", "share", "count", "channels-last", "buckets", "bf16"])
def test_replicas_stay_equal_bit_for_bit(found: list[dict[str, Any]], run: str) -> None:
    first, second = (flat(runs[run]["weights"]) for runs in found)
    assert torch.equal(first, second)
    assert not torch.equal(first, flat(network(first.dtype).state_dict()))


def test_all_elements_are_the_mean_of_all_reduce(found: list[dict[str, Any]]) -> None:
    """Bit for bit with two workers: to halve before adding, as all-reduce does, is as exact as
    after it. With three they would be a rounding apart.
    """
    for runs in found:
        for mine, plain in zip(runs["all"]["updates"], runs["all-reduce"]["updates"], strict=True):
            assert torch.equal(flat(mine), flat(plain))
        assert flat(runs["all"]["state"]["memory"]).count_nonzero() == 0
        assert runs["all"]["updates"][0].keys() == dict(network().named_parameters()).keys()


@pytest.mark.parametrize("run", ["share", "count", "buckets"])
def test_nothing_is_lost_whatever_the_buckets(found: list[dict[str, Any]], run: str) -> None:
    """What was applied and the mean of the memories are the mean of all gradients."""
    applied = sum(flat(update).double() for update in found[0][run]["updates"])
    waiting = sum(flat(runs[run]["state"]["memory"]) for runs in found) / WORKERS
    given = sum(flat(runs[run]["given"]) for runs in found) / WORKERS
    # Sums of a dozen numbers below 1.
    eps = torch.finfo(found[0][run]["updates"][0]["3.bias"].dtype).eps
    torch.testing.assert_close(applied + waiting, given, rtol=0, atol=12 * eps)
    assert torch.as_tensor(waiting).abs().max() > 1e-3


def test_buckets_become_others_after_the_first_step(found: list[dict[str, Any]]) -> None:
    """Which is what the tests of ``buckets`` are about."""
    few, many = (found[0][run]["updates"] for run in ("share", "buckets"))
    assert torch.equal(flat(few[0]), flat(many[0]))
    # Then the first layer's weight, of 60 elements, is a bucket of its own.
    counts = [[int(u["0.weight"].count_nonzero()) for u in run] for run in (few, many)]
    assert max(counts[1][1:]) <= WORKERS * round(SHARE * 60) < max(counts[0][1:])


def test_half_precision_keeps_what_rounding_loses(found: list[dict[str, Any]]) -> None:
    """In a group of one, whose mean has no rounding of its own."""
    for runs in found:
        assert runs["alone"]["state"]["bytes_sent"] == 0
        memory, updates = flat(runs["alone"]["state"]["memory"]), runs["alone"]["updates"]
        assert memory.dtype == torch.float32 and flat(updates[0]).dtype == torch.bfloat16
        applied = sum(flat(update).double() for update in updates)
        # fp32: a dozen numbers below 1; bf16 would lose up to 2^-9 of each.
        given = flat(runs["alone"]["given"])
        torch.testing.assert_close(applied + memory, given, rtol=0, atol=12 * 2.0**-24)
        assert (flat(updates[0]).count_nonzero()) == round(SHARE * D)
    assert not torch.equal(*(flat(runs["alone"]["weights"]) for runs in found))


@pytest.mark.parametrize(
    ("run", "count", "value_bytes"),
    [("share", round(SHARE * D), 8), ("count", 3, 4), ("all", D, 4), ("bf16", round(SHARE * D), 2)],
)
def test_what_is_sent(found: list[dict[str, Any]], run: str, count: int, value_bytes: int) -> None:
    """k values and k positions, a step; a ring's all-reduce sends ``2 (n - 1) / n`` of all."""
    for runs in found:
        sent = runs[run]["state"]["bytes_sent"]
        assert sent == STEPS * count * (value_bytes + 4) * (WORKERS - 1)
        all_reduced = STEPS * 2 * (WORKERS - 1) * D * value_bytes / WORKERS
        share = 2 * value_bytes / (WORKERS * (value_bytes + 4))
        assert (sent < all_reduced) == (count / D < share) == (run != "all")


def test_a_resumed_run_goes_on_bit_for_bit(found: list[dict[str, Any]]) -> None:
    for runs in found:
        assert torch.equal(flat(runs["resumed"]["weights"]), flat(runs["share"]["weights"]))
        first, second = (runs[run]["state"] for run in ("resumed", "share"))
        assert torch.equal(flat(first["memory"]), flat(second["memory"]))
        assert first["bytes_sent"] == second["bytes_sent"]
        # fp64; convolutions of another layout add up in another order.
        relaid, whole = (flat(runs[run]["weights"]) for run in ("relaid", "share"))
        torch.testing.assert_close(relaid, whole, rtol=1e-10, atol=1e-14)


# Without processes


def test_bad_options() -> None:
    for k in (0, 1.5, True):
        with pytest.raises(ValueError, match="k must be a count"):
            TopKErrorFeedback(k)
    with pytest.raises(ValueError, match="factor must be >= 0 and finite, got -1"):
        TopKErrorFeedback(1).scale_memory(-1.0)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"must hold memory and bytes_sent, got \[\]"),
        ({"memory": {}, "k": 1}, "must hold memory and bytes_sent"),
        ({"memory": {"3.bias": torch.ones(8)}, "bytes_sent": 0}, "'3.bias' fits no parameter"),
        ({"memory": {"4.bias": torch.ones(7)}, "bytes_sent": 0}, "'4.bias' fits no parameter"),
    ],
)
def test_states_that_do_not_fit(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKErrorFeedback(1).load_state_dict(network(), state)


def test_the_memory_follows_the_learning_rate() -> None:
    state, model = TopKErrorFeedback(1), network()
    held = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    state.load_state_dict(model, {"memory": held, "bytes_sent": 3})
    state.scale_memory(0.5)
    assert state.bytes_sent == 3
    assert torch.equal(flat(state.state_dict(model)["memory"]), torch.full_like(flat(held), 0.5))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
