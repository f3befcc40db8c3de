"""What the comparison of training methods counts, weighs and says; nothing here depends on time."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from maskedtrain.benchmark.training import (
    EXPERIMENTS,
    Flops,
    Share,
    Steps,
    TrainingRow,
    compare,
    epoch_flops,
    step_flops,
)
from maskedtrain.benchmark.training.comparison import together
from maskedtrain.benchmark.training.experiments import round_of
from maskedtrain.benchmark.training.steps import _Alive
from maskedtrain.layers.base import MaskedModule

CIFAR10 = EXPERIMENTS["cifar10-resnet18"]
WIDTHS = EXPERIMENTS["cifar10-resnet18-widths"]
DIGITS = EXPERIMENTS["digits-resnet8"]


def resnet18_flops(width: int) -> Flops:
    """Of one image of 32 x 32, by hand: 2 per multiply-add; a backward costs two forwards, but for
    the gradient of the images.
    """
    stem = 3 * 9 * width * 32**2
    total = stem
    for stage in range(4):
        w, pixels = width << stage, (32 >> stage) ** 2
        inputs = w if stage == 0 else w // 2
        total += (inputs * w * 9 + 3 * w * w * 9) * pixels
        total += 0 if stage == 0 else inputs * w * pixels
    total += 8 * width * 10
    return Flops(2 * total, 3 * 2 * total - 2 * stem)


def test_epochs_of_the_papers_table_3() -> None:
    slimmable, ats = (epoch_flops(CIFAR10, name).forward for name in ("slimmable", "ats"))
    assert slimmable == pytest.approx(62.7e12, rel=0.005)
    assert ats == pytest.approx(31.3e12, rel=0.005)


def test_epochs_of_each_method_by_hand() -> None:
    full, first, second, smallest = (resnet18_flops(w) * 45_000 for w in (64, 48, 32, 16))
    whole = full + first + second + smallest
    expected = {
        "standard": full,
        "core2": second,
        "separate": whole,
        "ats": whole * 0.25,
        "slimmable": whole,
        "sandwich": full + smallest + (first + second) * 0.5,
    }
    assert {*expected, "core", "core3"} == {*WIDTHS.methods}
    for method, flops in expected.items():
        found = epoch_flops(WIDTHS, method, batch_size=4)
        assert (found.forward, found.training) == pytest.approx((flops.forward, flops.training))


def test_an_epochs_images_cost_the_same_in_any_batches() -> None:
    assert epoch_flops(DIGITS, "ats", batch_size=4).forward == pytest.approx(
        epoch_flops(DIGITS, "ats").forward
    )
    one = step_flops(DIGITS, "standard", batch_size=4)
    epoch = epoch_flops(DIGITS, "standard", batch_size=4)
    assert (epoch.forward, epoch.training) == (one.forward * 1295 / 4, one.training * 1295 / 4)


@pytest.mark.parametrize("name", ["multi30k-lowrank32", "multi30k-lowrank4"])
def test_steps_of_a_transformer_by_hand(name: str) -> None:
    experiment = EXPERIMENTS[name]
    sentences, d, ffn, layers, vocab = 4, 256, 512, 3, 4564
    (tokens,) = experiment.sample
    rank = round(256 * experiment.ratios[0])

    def forward(*, lowrank: bool) -> int:
        def linear(inputs: int, outputs: int) -> int:
            return rank * (inputs + outputs) if lowrank else inputs * outputs

        # Queries and keys by factors in the core; values and outputs in full; scores and means.
        attention = 2 * linear(d, d) + 2 * d * d + 2 * tokens * d
        one_layer = linear(d, ffn) + linear(ffn, d)
        encoder, decoder = attention + one_layer, 2 * attention + one_layer
        return 2 * sentences * tokens * (layers * (encoder + decoder) + d * vocab)

    full, core = (step_flops(experiment, m, batch_size=sentences).forward for m in experiment.alone)
    assert (full, core) == (forward(lowrank=False), forward(lowrank=True))


def test_every_plan_of_a_method_has_its_turn() -> None:
    with torch.device("meta"):
        rounds = {name: round_of(WIDTHS.method(name)) for name in ("ats", "slimmable", "sandwich")}
    trained = {
        name: [{item.subnet.name for item in plan.passes} for plan in plans]
        for name, plans in rounds.items()
    }
    assert trained["ats"] == [{"full"}, {"core"}, {"core2"}, {"core3"}]
    assert list(rounds["ats"].values()) == [0, 1, 2, 3]
    assert trained["slimmable"] == [{"full", "core", "core2", "core3"}]
    assert sorted(map(sorted, trained["sandwich"])) == [
        ["core", "core3", "full"],
        ["core2", "core3", "full"],
    ]
    assert WIDTHS.trains("sandwich") == "full, core3 (0.25) and one of core (0.75), core2 (0.5)"


def test_a_sandwich_needs_a_network_between_two() -> None:
    assert "sandwich" not in CIFAR10.methods
    with pytest.raises(ValueError, match="unknown method 'sandwich'"):
        CIFAR10.method("sandwich")
    with pytest.raises(ValueError, match="unknown method 'separate'"):
        CIFAR10.method("separate")


def test_a_batch_has_samples() -> None:
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        Steps(DIGITS, "ats", batch_size=0)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        epoch_flops(DIGITS, "ats", batch_size=0)


@pytest.mark.parametrize("name", ["digits-resnet8", "multi30k-lowrank32"])
def test_steps_train_what_the_method_says(name: str) -> None:
    experiment = EXPERIMENTS[name]
    for method in ("standard", "core", "ats", "slimmable"):
        steps = Steps(experiment, method, batch_size=2)
        before = [p.detach().clone() for p in steps.trainer.model.parameters()]
        steps()
        after = list(steps.trainer.model.parameters())
        changed = [not torch.equal(*ps) for ps in zip(before, after, strict=True)]
        assert sum(changed) > len(changed) / 2
        networks = {"standard": ["full"], "core": ["core"]}.get(method, ["full", "core"])
        assert steps.trainer.passes == dict.fromkeys(networks, 1)
        assert steps.count == (2 if method == "ats" else 1)


def test_a_core_alone_is_a_network_of_its_own() -> None:
    model = Steps(DIGITS, "core", batch_size=2).trainer.model
    assert not any(isinstance(module, MaskedModule) for module in model.modules())
    full = Steps(DIGITS, "standard", batch_size=2).trainer.model
    sizes = [sum(p.numel() for p in network.parameters()) for network in (model, full)]
    assert sizes[0] < 0.3 * sizes[1]


def test_memory_of_a_training() -> None:
    found = {
        method: Steps(DIGITS, method, batch_size=4).memory()
        for method in ("standard", "core", "ats", "slimmable")
    }
    model: nn.Module = Steps(DIGITS, "standard", batch_size=4).trainer.model
    parameters = sum(p.nbytes for p in model.parameters())
    # Momentum is as large as what it is of.
    assert found["standard"].held_bytes == 2 * parameters + sum(b.nbytes for b in model.buffers())
    assert found["core"].held_bytes < 0.3 * found["standard"].held_bytes
    # At the end of a backward there are all gradients.
    assert all(found[m].step_bytes >= parameters for m in ("standard", "ats", "slimmable"))
    # Its full step is standard training's; slimmable training holds gradients through its core's.
    assert found["ats"].step_bytes == found["standard"].step_bytes
    assert found["slimmable"].step_bytes >= found["ats"].step_bytes
    assert found["core"].step_bytes < found["standard"].step_bytes


def test_tensors_count_until_they_are_gone() -> None:
    held = torch.ones(1000)
    with _Alive() as alive:
        twice = held * 2
        assert alive.peak_bytes == 4000, "not what was there before"
        twice.view(10, 100).add_(held.view(10, 100))
        assert alive.peak_bytes == 4000, "not views, nor what is written in place"
        thrice = twice + held
        del twice
        again = thrice + held
    assert alive.peak_bytes == 8000 and again.shape == held.shape


def made_up(flops: float, time: float, *, baseline: str = "standard", noisy: bool = False) -> Share:
    return Share(baseline, flops, time, time - 0.01, time + 0.02, 5, noisy, baseline_s=2.0)


def row(method: str, **shares: Share) -> TrainingRow:
    return TrainingRow(
        method=method,
        trains="full",
        device="cpu",
        batch_size=1,
        steps_per_epoch=1,
        forward_flops_per_step=1,
        forward_flops_per_epoch=1,
        training_flops_per_step=1,
        training_flops_per_epoch=1,
        seconds_per_step=1,
        seconds_per_epoch=1,
        held_bytes=1,
        step_bytes=1,
        **shares,
    )


def test_verdicts() -> None:
    of_slimmable = made_up(0.5, 0.503, baseline="slimmable")
    ats = row("ats", of_slimmable=of_slimmable, of_standard=made_up(0.75, 0.9))
    assert ats.verdict == (
        "ats takes 0.50 of slimmable's time at 0.50 of its FLOPs, as they say; "
        "0.90 of standard's time at 0.75 of its FLOPs, 20% more than they say"
    )
    assert row("core", of_standard=made_up(0.5, 0.4)).verdict == (
        "core takes 0.40 of standard's time at 0.50 of its FLOPs, 20% less than they say"
    )
    assert row("core", of_standard=made_up(0.5, 0.4, noisy=True)).verdict == (
        "core takes 0.40 of standard's time at 0.50 of its FLOPs, too noisy to judge"
    )
    assert row("standard").verdict == "what the others are measured by"


def test_separate_training_is_the_sum() -> None:
    first, second = made_up(0.5, 0.6), made_up(0.25, 0.3, noisy=True)
    found = together([first, second])
    assert (found.flops, found.noisy) == (1.75, True)
    assert (found.time, found.low, found.high) == pytest.approx((1.9, 1.88, 1.94))


def test_rows_of_a_comparison() -> None:
    rows = compare(DIGITS, budget_s=0, batch_size=2)
    assert [found.method for found in rows] == list(DIGITS.methods)
    by_method = {found.method: found for found in rows}
    standard, core, separate = (by_method[name] for name in ("standard", "core", "separate"))
    assert standard.of_standard is None and separate.of_standard is not None
    assert core.of_standard is not None
    assert separate.of_standard.time == 1 + core.of_standard.time
    assert separate.seconds_per_step == pytest.approx(
        standard.seconds_per_step + core.seconds_per_step
    )
    assert (separate.held_bytes, separate.step_bytes) == (standard.held_bytes, standard.step_bytes)
    ats = by_method["ats"]
    assert ats.of_slimmable is not None and ats.of_slimmable.flops == 0.5
    assert ats.of_slimmable.low <= ats.of_slimmable.time <= ats.of_slimmable.high
    for found in rows:
        assert found.steps_per_epoch == 1295 / 2
        assert found.seconds_per_epoch == found.seconds_per_step * 1295 / 2
        expected = epoch_flops(DIGITS, found.method, batch_size=2)
        assert found.forward_flops_per_epoch == pytest.approx(expected.forward)
        assert found.training_flops_per_epoch == pytest.approx(expected.training)
        assert json.loads(json.dumps(found.record()))["verdict"] == found.verdict
