"""What each method costs beside standard and slimmable training, as rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from maskedtrain.benchmark.timing import Disturbed, paired, timed_on
from maskedtrain.benchmark.training.experiments import Experiment, Flops, step_flops
from maskedtrain.benchmark.training.steps import Memory, Steps

__all__ = ["Share", "TrainingRow", "compare", "together"]

_MOST_ROUNDS = 15
# Within this, time goes with FLOPs.
_MARGIN = 0.1
# Whose steps are timed against slimmable training's, too.
_AGAINST_SLIMMABLE = ("ats", "sandwich")


@dataclass(frozen=True)
class Share:
    """A step's FLOPs (forward and backward) and time as shares of a baseline's step.

    ``time`` is the median of paired ratios, with its quartiles; ``noisy`` where the machine was too
    busy for the control to hold, and they are of disturbed rounds.
    """

    baseline: str
    flops: float
    time: float
    low: float
    high: float
    rounds: int
    noisy: bool
    baseline_s: float
    """The baseline's own step."""

    def __str__(self) -> str:
        shares = f"{self.time:.2f} of {self.baseline}'s time at {self.flops:.2f} of its FLOPs"
        more = self.time / self.flops - 1
        if self.noisy:
            return f"{shares}, too noisy to judge"
        if abs(more) <= _MARGIN:
            return f"{shares}, as they say"
        return f"{shares}, {abs(more):.0%} {'more' if more > 0 else 'less'} than they say"


@dataclass(frozen=True)
class TrainingRow:
    """A method's costs. A step is one mini-batch, its figures are means over the method's steps; of
    ``separate`` it is a step of every network.
    """

    method: str
    trains: str
    """Which networks, in words."""
    device: str
    batch_size: int
    steps_per_epoch: float
    forward_flops_per_step: float
    forward_flops_per_epoch: float
    """The paper's accounting."""
    training_flops_per_step: float
    training_flops_per_epoch: float
    """Forward and backward."""
    seconds_per_step: float
    """The standard step's, the median of all that were timed, times this one's share of it."""
    seconds_per_epoch: float
    held_bytes: int
    """Parameters, buffers, optimizer state. Of ``separate``, whose networks are trained one after
    the other, of the one that takes most."""
    step_bytes: int
    """What a step takes beside them at its peak (see ``Memory``)."""
    of_standard: Share | None = None
    of_slimmable: Share | None = None

    @property
    def verdict(self) -> str:
        """What its time is, beside its FLOPs."""
        shares = [str(of) for of in (self.of_slimmable, self.of_standard) if of]
        if not shares:
            return "what the others are measured by"
        return f"{self.method} takes {'; '.join(shares)}"

    def record(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {**asdict(self), "verdict": self.verdict}


def _share(ours: Steps, baseline: Steps, *, flops: float, budget_s: float) -> Share:
    """Our step's time as a share of the baseline's step, in at most 15 paired rounds, and for so
    long unless there are fewer than three. Both must have been called once.
    """
    timed = timed_on(ours.device)
    noisy = False
    try:
        found = paired(
            baseline, ours, rounds=_MOST_ROUNDS, warmup=0, timed=timed, budget_s=budget_s
        )
    except Disturbed as disturbed:
        found, noisy = disturbed.found, True
    # Calls may be of different numbers of steps.
    steps = baseline.count / ours.count
    return Share(
        baseline=baseline.method,
        flops=flops,
        time=found.ratio * steps,
        low=found.low * steps,
        high=found.high * steps,
        rounds=found.rounds,
        noisy=noisy,
        baseline_s=found.a_ms / 1e3 / baseline.count,
    )


def together(shares: Sequence[Share]) -> Share:
    """Of a baseline's step and these other ones, one after the other: quartiles are added up."""
    flops, time, low, high = (
        1 + sum(getattr(item, name) for item in shares) for name in ("flops", "time", "low", "high")
    )
    return Share(
        baseline=shares[0].baseline,
        flops=flops,
        time=time,
        low=low,
        high=high,
        rounds=min(item.rounds for item in shares),
        noisy=any(item.noisy for item in shares),
        baseline_s=statistics.median(item.baseline_s for item in shares),
    )


def compare(
    experiment: Experiment,
    *,
    budget_s: float = 60.0,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    autocast: torch.dtype | None = None,
) -> list[TrainingRow]:
    """Count, time and weigh the steps of every method of the experiment.

    Args:
        experiment: one of ``EXPERIMENTS``.
        budget_s: seconds that it may take, roughly: three rounds of each pair are timed anyway.
        device: where.
        batch_size: samples of a step; the experiment's for such a device where not given.
        autocast: dtype of the forward passes (``torch.bfloat16``), or None.
    """
    deadline = time.perf_counter() + budget_s
    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "autocast": autocast}
    baselines = {name: Steps(experiment, name, **options) for name in ("standard", "slimmable")}
    standard, slimmable = baselines.values()
    timed = [name for name in experiment.methods if name != "separate"]
    size = standard.batch_size
    flops = {name: step_flops(experiment, name, batch_size=size) for name in timed}
    flops["separate"] = sum((flops[name] for name in experiment.alone), Flops(0, 0))
    pairs = [(name, standard) for name in timed if name != "standard"]
    pairs += [(name, slimmable) for name in timed if name in _AGAINST_SLIMMABLE]
    memory: dict[str, Memory] = {}
    found: dict[tuple[str, str], Share] = {}
    left = len(pairs)
    # Baselines first: they are to be warm.
    for name in sorted(timed, key=lambda name: name not in baselines):
        steps = baselines.get(name) or Steps(experiment, name, **options)
        memory[name] = steps.memory()
        for baseline in (other for ours, other in pairs if ours == name):
            found[name, baseline.method] = _share(
                steps,
                baseline,
                flops=flops[name].training / flops[baseline.method].training,
                budget_s=(deadline - time.perf_counter()) / left,
            )
            left -= 1
    cores = [found[name, "standard"] for name in experiment.cores]
    found["separate", "standard"] = together(cores)
    memory["separate"] = max((memory[n] for n in experiment.alone), key=lambda m: m.peak_bytes)
    return _rows(experiment, standard, flops, memory, found)


def _rows(
    experiment: Experiment,
    standard: Steps,
    flops: Mapping[str, Flops],
    memory: Mapping[str, Memory],
    found: Mapping[tuple[str, str], Share],
) -> list[TrainingRow]:
    steps_per_epoch = experiment.samples / standard.batch_size
    standard_s = statistics.median(
        share.baseline_s for (_, baseline), share in found.items() if baseline == "standard"
    )
    rows: list[TrainingRow] = []
    for name in experiment.methods:
        of_standard = found.get((name, "standard"))
        seconds = standard_s * (of_standard.time if of_standard else 1)
        rows.append(
            TrainingRow(
                method=name,
                trains=experiment.trains(name),
                device=standard.device.type,
                batch_size=standard.batch_size,
                steps_per_epoch=steps_per_epoch,
                forward_flops_per_step=flops[name].forward,
                forward_flops_per_epoch=flops[name].forward * steps_per_epoch,
                training_flops_per_step=flops[name].training,
                training_flops_per_epoch=flops[name].training * steps_per_epoch,
                seconds_per_step=seconds,
                seconds_per_epoch=seconds * steps_per_epoch,
                held_bytes=memory[name].held_bytes,
                step_bytes=memory[name].step_bytes,
                of_standard=of_standard,
                of_slimmable=found.get((name, "slimmable")),
            )
        )
    return rows
