"""Step-size schedules as small typed values: ``schedule(t)`` is the value at step ``t = 0, 1, 2, ...``."""

import math
from abc import ABC, abstractmethod

from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive


class Schedule(ABC):
    """A number that depends on the step ``t``; it must not be negative."""

    @abstractmethod
    def __call__(self, t: int) -> float:
        """Returns the value at step ``t``, counted from 0."""


class Linear(Schedule):
    """``start + (end - start) min(t / steps, 1)``: a ramp that then stays at ``end``.

    Args:
        start: value at ``t = 0``; it may be 0.
        end: value from ``t = steps`` on.
        steps: length of the ramp, in steps.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        if not 0 <= start < float("inf"):
            raise BilevelError(f"Linear.start must not be negative, got {start}.")
        self.start, self.end = start, positive("Linear.end", end)
        self.steps = int(positive("Linear.steps", steps))

    @override
    def __call__(self, t: int) -> float:
        return self.start + (self.end - self.start) * min(t / self.steps, 1.0)


class InverseTime(Schedule):
    """``initial * halving / (halving + t)``: the decreasing step of stochastic approximation.

    Args:
        initial: value at ``t = 0``.
        halving: number of steps after which half of ``initial`` is left (gamma in BSGM: Grazzi, Pontil, Salzo,
            "Bilevel Optimization with a Lower-level Contraction", JMLR 2023).
    """

    def __init__(self, initial: float, halving: float) -> None:
        self.initial, self.halving = positive("InverseTime.initial", initial), positive("InverseTime.halving", halving)

    @override
    def __call__(self, t: int) -> float:
        return self.initial * self.halving / (self.halving + t)


class Power(Schedule):
    """``initial * (t + 1) ** exponent``.

    Args:
        initial: value at ``t = 0``.
        exponent: negative to decrease, e.g. -0.5.
    """

    def __init__(self, initial: float, exponent: float) -> None:
        self.initial, self.exponent = positive("Power.initial", initial), exponent

    @override
    def __call__(self, t: int) -> float:
        return float(self.initial * (t + 1) ** self.exponent)


class Cosine(Schedule):
    """``final + (initial - final) (1 + cos(pi min(t / steps, 1))) / 2``: half a cosine that then stays at ``final``.

    I. Loshchilov, F. Hutter. SGDR: Stochastic Gradient Descent with Warm Restarts. ICLR 2017, without restarts.

    Args:
        initial: value at ``t = 0``.
        final: value from ``t = steps`` on; it may be 0.
        steps: length of the half wave, in steps.
    """

    def __init__(self, initial: float, final: float, steps: int) -> None:
        if not 0 <= final < float("inf"):
            raise BilevelError(f"Cosine.final must not be negative, got {final}.")
        self.initial, self.final = positive("Cosine.initial", initial), final
        self.steps = int(positive("Cosine.steps", steps))

    @override
    def __call__(self, t: int) -> float:
        return self.final + (self.initial - self.final) * (1 + math.cos(math.pi * min(t / self.steps, 1.0))) / 2


def scheduled(name: str, value: float | Schedule) -> float | Schedule:
    """Returns ``value`` if it is a schedule or positive.

    Raises:
        BilevelError: if it is neither; the message starts with ``name``.
    """
    return value if isinstance(value, Schedule) else positive(name, value)


def at(value: float | Schedule, t: int) -> float:
    """Returns a setting's value at step ``t``."""
    return value(t) if isinstance(value, Schedule) else value
