"""What a ratio of times means for a user, in words."""

from __future__ import annotations

__all__ = ["BUSY", "UNDECIDED", "factor", "verdict"]

# A gain that nobody would change a layer for.
WORTH = 1.1
# Share of the time that a process waits for others where the machine is not its own; of one that
# is, a few per cent.
BUSY = 0.1
LARGE = 0.5
UNDECIDED = "undecided: too noisy"


def verdict(
    speedup: float,
    low: float,
    high: float,
    *,
    noise: float,
    waited: float = 0.0,
    dense_ran: bool = False,
) -> str:
    """Whether a mask pays.

    Args:
        speedup: dense time / ours, the median of the rounds.
        low: its lower quartile. A win is one that this shows, beyond the noise.
        high: its upper quartile. If even this is no gain of more than a tenth there is none; a gain
            that can neither be shown nor ruled out is undecided.
        noise: how far two runs of one thing, one right after the other, are apart, as a share.
        waited: share of the time that the process's threads waited for a processor. On a busy
            machine all takes alike long: only a large gain shows, and none can be ruled out.
        dense_ran: "auto" itself took the dense computation.
    """
    busy = waited > BUSY
    if low > 1 + max(noise, LARGE if busy else 0):
        return f"masked wins {factor(speedup)}"
    if busy or high > WORTH:
        return UNDECIDED
    return "no gain: use dense (auto does)" if dense_ran else "no gain: use dense"


def factor(value: float) -> str:
    """3.14 -> "3.1x", 0.4567 -> "0.46x", 31.4 -> "31x"."""
    return f"{value:#.2g}".rstrip(".") + "x"
