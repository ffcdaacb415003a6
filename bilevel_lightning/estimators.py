r"""Estimators of directions from minibatches: plain, averaged, and with reduced variance.

A direction is a sum of terms, each the mean over samples of a function phi of a point u = (x, y, v) or (x, y). An
estimator turns evaluations on minibatches into the direction d_k at the point u_k of iteration k.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from typing_extensions import override

from bilevel_lightning import randomness, tree
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.schedules import Power, Schedule, at, scheduled
from bilevel_lightning.state import Row
from bilevel_lightning.tree import Params

Memory = dict[str, Params | Row]


class Term(NamedTuple):
    """A term of a direction on the minibatches of an iteration.

    Attributes:
        evaluate: point -> directions.
        part: the number of its minibatch in a fixed partition of the samples.
        share: the share of that part of all samples.
    """

    evaluate: Callable[[Params], Params]
    part: int = 0
    share: float = 1.0


def total(directions: Iterable[Params]) -> Params:
    """Returns the sum of directions, which need not have all names."""
    found: Params = {}
    for part in directions:
        found.update({name: found[name] + t if name in found else t for name, t in part.items()})
    return found


def evaluate(terms: Sequence[Term], point: Params) -> Params:
    """Returns the sum of the terms at a point."""
    return total(term.evaluate(point) for term in terms)


class Estimator(ABC):
    """Turns evaluations on minibatches into directions."""

    partitioned = False
    """Whether minibatches must be parts of a fixed partition."""
    whole = False
    """Whether a restart takes all samples."""

    def start(self, point: Params, terms: Sequence[Params], parts: Sequence[int]) -> dict[str, Params]:
        """Returns the first memory.

        Args:
            point: the first point.
            terms: what each term's directions look like.
            parts: in how many parts the samples of each term are partitioned; 1: they are not.
        """
        return {}

    def restarts(self, k: int) -> bool:
        """Whether iteration ``k`` estimates without its memory."""
        return True

    @abstractmethod
    def estimate(
        self, terms: Sequence[Term], point: Params, memory: Mapping[str, Params], k: int, restart: bool
    ) -> tuple[Params, Memory]:
        """Returns the directions at ``point`` in iteration ``k``, and the new memory."""


class Plain(Estimator):
    """d_k = phi(u_k) on the minibatches of the iteration."""

    @override
    def estimate(
        self, terms: Sequence[Term], point: Params, memory: Mapping[str, Params], k: int, restart: bool
    ) -> tuple[Params, Memory]:
        return evaluate(terms, point), {}


class MovingAverage(Estimator):
    r"""d_k = (1 - theta) d_{k-1} + theta phi(u_k), for the direction of x; those of y and v are plain.

    Args:
        theta: weight of the newest, in (0, 1], or a schedule over the iterations. Default 0.5.

    Raises:
        BilevelError: if theta is out of its range.

    References:
        X. Chen, T. Xiao, K. Balasubramanian. Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed
        Smoothness Conditions. JMLR 2024.
    """

    def __init__(self, theta: float | Schedule = 0.5) -> None:
        self.theta = _weight("MovingAverage.theta", theta)

    @override
    def start(self, point: Params, terms: Sequence[Params], parts: Sequence[int]) -> dict[str, Params]:
        like = {name: t for term in terms for name, t in term.items() if name.startswith("x/")}
        return {"direction": tree.zeros_like(like)}

    @override
    def restarts(self, k: int) -> bool:
        return k == 0

    @override
    def estimate(
        self, terms: Sequence[Term], point: Params, memory: Mapping[str, Params], k: int, restart: bool
    ) -> tuple[Params, Memory]:
        found, theta = evaluate(terms, point), 1.0 if restart else at(self.theta, k)
        averaged = {n: torch.lerp(t, found[n], theta) for n, t in memory["direction"].items()}
        return {**found, **averaged}, {"direction": averaged}


class _TwoPoints(Estimator):
    """Estimators whose memory is the last point and the directions there."""

    @override
    def start(self, point: Params, terms: Sequence[Params], parts: Sequence[int]) -> dict[str, Params]:
        like = {name: t for term in terms for name, t in term.items()}
        return {"before": point, "direction": tree.zeros_like(like)}

    @staticmethod
    def _both(terms: Sequence[Term], point: Params, before: Params) -> tuple[Params, Params]:
        """Returns the directions at both points on the same samples and with the same random numbers."""
        generators = randomness.state(point.values())
        found = evaluate(terms, point)
        with randomness.replayed(generators):
            return found, evaluate(terms, before)


class STORM(_TwoPoints):
    r"""d_k = phi(u_k) + (1 - eta_k) (d_{k-1} - phi(u_{k-1})), both on the minibatches of iteration k; d_0 = phi(u_0).

    With eta = 1 it is `Plain`. In released benchmark code u_{-1} is zero; here iteration 0 has no correction.

    Args:
        eta: in (0, 1], or a schedule over the iterations. Default ``0.5 (k + 1)^{-2/3}``.

    Raises:
        BilevelError: if eta is out of its range.

    References:
        A. Cutkosky, F. Orabona. Momentum-Based Variance Reduction in Non-Convex SGD. NeurIPS 2019.
    """

    def __init__(self, eta: float | Schedule | None = None) -> None:
        self.eta = _weight("STORM.eta", Power(0.5, -2 / 3) if eta is None else eta)

    @override
    def restarts(self, k: int) -> bool:
        return k == 0

    @override
    def estimate(
        self, terms: Sequence[Term], point: Params, memory: Mapping[str, Params], k: int, restart: bool
    ) -> tuple[Params, Memory]:
        eta = 1.0 if restart else at(self.eta, k)
        if eta == 1:
            found = evaluate(terms, point)
        else:
            now, before = self._both(terms, point, memory["before"])
            found = {n: t + (1 - eta) * (memory["direction"][n] - before[n]) for n, t in now.items()}
        return found, {"before": tree.clone(point), "direction": found}


class SARAH(_TwoPoints):
    r"""d_k = d_{k-1} + phi(u_k) - phi(u_{k-1}), and every ``period`` iterations phi(u_k) over all samples.

    Args:
        period: iterations from one pass over all samples to the next. Default 100.

    Raises:
        BilevelError: if period is not positive.

    References:
        L. M. Nguyen, J. Liu, K. Scheinberg, M. Takáč. SARAH: A Novel Method for Machine Learning Problems Using
        Stochastic Recursive Gradient. ICML 2017.
    """

    whole = True

    def __init__(self, period: int = 100) -> None:
        if period < 1:
            raise BilevelError(f"SARAH.period must be at least 1, got {period}.")
        self.period = period

    @override
    def restarts(self, k: int) -> bool:
        return k % self.period == 0

    @override
    def estimate(
        self, terms: Sequence[Term], point: Params, memory: Mapping[str, Params], k: int, restart: bool
    ) -> tuple[Params, Memory]:
        if restart:
            found = evaluate(terms, point)
        else:
            now, before = self._both(terms, point, memory["before"])
            found = {n: memory["direction"][n] + t - before[n] for n, t in now.items()}
        return found, {"before": tree.clone(point), "direction": found}


class SAGA(Estimator):
    r"""d_k = sum over terms of phi_i(u_k) - m_i + sum_j w_j m_j; then m_i = phi_i(u_k).

    The samples of each term are partitioned into parts of shares w_j, of which i is the one of this iteration. Memories
    start at zero and take (number of parts) times the size of the directions.

    References:
        A. Defazio, F. Bach, S. Lacoste-Julien. SAGA: A Fast Incremental Gradient Method With Support for Non-Strongly
        Convex Composite Objectives. NeurIPS 2014.
    """

    partitioned = True

    @override
    def start(self, point: Params, terms: Sequence[Params], parts: Sequence[int]) -> dict[str, Params]:
        memory = {}
        for i, (term, number) in enumerate(zip(terms, parts, strict=True)):
            memory[f"table{i}"] = {name: t.new_zeros((number, *t.shape)) for name, t in term.items()}
            memory[f"mean{i}"] = tree.zeros_like(term)
        return memory

    @override
    def estimate(
        self, terms: Sequence[Term], point: Params, memory: Mapping[str, Params], k: int, restart: bool
    ) -> tuple[Params, Memory]:
        found: list[Params] = []
        new: Memory = {}
        for i, term in enumerate(terms):
            table, mean, now = memory[f"table{i}"], memory[f"mean{i}"], term.evaluate(point)
            if term.part >= len(next(iter(table.values()))):
                raise BilevelError(
                    "The batch names more parts than SAGA has memories for: let the data module's parts() say how many."
                )
            change = {n: t - table[n][term.part] for n, t in now.items()}
            found.append(tree.axpy(1.0, mean, change))
            new[f"table{i}"], new[f"mean{i}"] = Row(term.part, now), tree.axpy(term.share, change, mean)
        return total(found), new


def _weight(name: str, value: float | Schedule) -> float | Schedule:
    if not isinstance(value, Schedule) and not 0 < value <= 1:
        raise BilevelError(f"{name} must be in (0, 1], got {value}.")
    return scheduled(name, value)
