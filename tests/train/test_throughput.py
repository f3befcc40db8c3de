"""What steps cost, by network."""

from __future__ import annotations

import torch

from maskedtrain.training.throughput import Meter, matmul_flops_per_s


def test_a_network_is_charged_for_its_own_steps():
    flops = {"full": lambda inputs: 100 * len(inputs), "core": lambda inputs: 10 * len(inputs)}
    meter = Meter(flops, peak_flops_per_s=1000.0)
    targets = torch.tensor([1, 2, -100])
    stream = meter.seen([([0] * 3, targets)] * 5)

    next(stream)
    next(stream)
    assert meter.step(["full"], 2.0) == 600
    next(stream)
    assert meter.step(["core"], 0.5) == 30
    # Two batches of 2 targets each in 2 seconds, 600 FLOPs of the 2,000 that were possible.
    assert meter.rates("full") == {"targets_per_s": 2.0, "flop_utilization": 0.3}
    assert meter.rates("core") == {"targets_per_s": 4.0, "flop_utilization": 0.06}
    # From then on it counts anew; a step of both costs both and is both's.
    next(stream)
    assert meter.step(["full", "core"], 1.0) == 330
    assert meter.rates("full") == meter.rates("core")
    next(stream)
    assert meter.step(["full"], 3.0) == 300
    assert meter.rates("full") == {"targets_per_s": 2 / 3, "flop_utilization": 0.1}


def test_measuring_the_machine_draws_no_random_numbers():
    before = torch.get_rng_state()
    rate = matmul_flops_per_s(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15
    assert torch.equal(torch.get_rng_state(), before)
