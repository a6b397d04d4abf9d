"""Speeds over the course of training: functions of progress, 0 at the first step and 1 after the last."""

from collections.abc import Callable

Schedule = Callable[[float], float]


def fading(speed: float, *, start: float = 0.7) -> Schedule:
    """Constant up to the share `start` of training, then down to 0 in a straight line: the bias comes to rest."""
    if not 0 <= start < 1:
        raise ValueError(f"start={start} is no share of training that leaves some to fade in: use 0 to below 1")
    return lambda progress: speed * min(1.0, max(0.0, (1 - progress) / (1 - start)))


def frozen_after(speed: float, share: float) -> Schedule:
    """Constant up to the share of training, then 0.

    DeepSeek-V3's recipe is frozen_after(1e-3, 14.3 / 14.8): 0.001 for 14.3 of 14.8 trillion tokens, then 0
    (arXiv 2412.19437, sec. 4.2).
    """
    _check_share(share)
    return lambda progress: speed if progress < share else 0.0


def warming(speed: float, share: float) -> Schedule:
    """Up from 0 to `speed` in a straight line over the first share of training, then constant.

    While a router learns its first directions a fast bias answers to noise.
    """
    _check_share(share)
    return lambda progress: speed * min(1.0, progress / share)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is no share of training: use a number above 0, up to 1")
