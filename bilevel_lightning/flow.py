"""Gradient flow as an optimizer: what many small steps of gradient descent do, with fewer gradients."""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, Diverged, positive

DAMPING = 2 / 13  # that of Sommeijer et al.; the stable interval is 2 % shorter for it
SAFETY = 1.2  # of the estimated curvature
SHORTEST = 1e-9  # step, as a share of the first
POWERS = 50  # products at most of the first estimate of L, which rounding can keep from settling
FINEST = 10  # tolerance, in units of the parameters' rounding, below which an error's estimate is rounding itself


class Stage(NamedTuple):
    """Coefficients of ``y_j = (1 - mu - nu) y_0 + mu y_{j-1} + nu y_{j-2} + h (new F_{j-1} + first F_0)``."""

    mu: float
    nu: float
    new: float
    first: float


Slope = Callable[[Tensor], Tensor]


class GradientFlow(Optimizer):
    r"""Follows the gradient flow ``dy/dt = - grad g(y)`` for a time ``lr`` in each call of ``step``.

    Gradient descent with step size h < 2 / L, where L is the largest curvature of g, follows the same flow: n of its
    steps are a time n h, or n h / (1 - momentum) with momentum. This goes the same way in fewer gradients, by the
    Runge-Kutta-Chebyshev method of second order, whose steps of s gradients are stable for a time of
    .65 (s^2 - 1) / L. The steps are chosen by an estimate of the error of each, and s by one of L (power iteration
    with differences of gradients). It is for training that ends before the minimum, where the end depends on the way;
    for the minimum itself ``torch.optim.LBFGS`` is quicker.

    Args:
        params: to train.
        lr: time to follow in one call of ``step``.
        tol: largest estimated error of an inner step, relative to the parameters' Euclidean norm. Default 0.1, which
            left an error of 0.8 % at the end of 15 such steps (docs/poisoning.md).

    Raises:
        BilevelError: if a setting is impossible, or tol is finer than the parameters' precision.
        Diverged: if the loss cannot be followed, being not finite or not smooth.

    References:
        B. P. Sommeijer, L. F. Shampine, J. G. Verwer. RKC: An explicit solver for parabolic PDEs. Journal of
        Computational and Applied Mathematics 88, 1998.
    """

    def __init__(self, params: Iterable[Any], lr: float, tol: float = 0.1) -> None:
        super().__init__(params, {"lr": positive("GradientFlow.lr", lr), "tol": positive("GradientFlow.tol", tol)})
        if len(self.param_groups) > 1:
            raise BilevelError("GradientFlow takes one parameter group: a flow has one time.")

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        """Follows the flow.

        Args:
            closure: evaluates the loss, of the same samples and without dropout each time, and leaves its gradient in
                the parameters.

        Returns:
            The loss at the start.
        """
        if closure is None:
            raise BilevelError("GradientFlow evaluates several gradients in a step: give step(closure).")
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.requires_grad]
        if not params:
            raise BilevelError("GradientFlow has nothing to train: no parameter has requires_grad.")
        losses = []

        def put(y: Tensor) -> None:
            for p, values in zip(params, y.split_with_sizes([p.numel() for p in params]), strict=True):
                p.copy_(values.view_as(p))

        def slope(y: Tensor) -> Tensor:
            put(y)
            with torch.enable_grad():
                losses.append(float(closure()))
            return -torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])

        y = torch.cat([p.flatten() for p in params])
        finest = FINEST * torch.finfo(y.dtype).eps
        if group["tol"] < finest:
            raise BilevelError(
                f"GradientFlow.tol={group['tol']} is finer than {y.dtype} can tell: raise it to {finest:.1e} or more, "
                "or train in float64."
            )
        try:
            put(follow(slope, y, group["lr"], group["tol"]))
        except BaseException:
            put(y)
            raise
        return losses[0]


def follow(slope: Slope, y: Tensor, time: float, tol: float) -> Tensor:
    """Returns y after the flow ``dy/dt = slope(y)`` of this time."""
    first = slope(y)
    direction, known, largest = first, -1.0, 0.0
    for _ in range(POWERS):
        direction, largest = curvature(slope, y, first, direction)
        if not abs(largest - known) > 0.02 * largest:
            break
        known = largest
    left, h = time, min(time, 1 / largest) if largest else time
    shortest = SHORTEST * h
    while left > 0:
        if not math.isfinite(largest) or h < shortest:
            raise Diverged(
                "GradientFlow cannot follow the loss, which is not finite or not smooth: take another optimizer."
            )
        moved = chebyshev(slope, y, first, h, max(2, math.ceil(math.sqrt(1 + SAFETY * largest * h / 0.65))))
        last = slope(moved)
        error = torch.linalg.vector_norm(0.8 * (y - moved) + 0.4 * h * (first + last))
        size = torch.maximum(torch.linalg.vector_norm(y), torch.linalg.vector_norm(moved))
        share = float(error / (tol * size)) if error > 0 else 0.0 if error == 0 else math.inf
        if share <= 1:
            left, y, first = left - h, moved, last
        else:
            direction = first  # the curvature there may be that of another direction than the last one's
        h *= min(5.0, max(0.1, 0.8 * share ** (-1 / 3))) if share else 5.0
        h = left if h > 0.99 * left else h
        if left > 0:
            direction, largest = curvature(slope, y, first, direction)
    return y


def chebyshev(slope: Slope, y: Tensor, first: Tensor, h: float, stages: int) -> Tensor:
    """Returns y after a time h, in so many stages; ``first`` is the slope at y."""
    (*_, scale, _), *rest = coefficients(stages)
    before, now = y, y + h * scale * first
    for mu, nu, new, of_first in rest:
        following = (1 - mu - nu) * y + mu * now + nu * before + h * (new * slope(now) + of_first * first)
        before, now = now, following
    return now


def curvature(slope: Slope, y: Tensor, first: Tensor, direction: Tensor) -> tuple[Tensor, float]:
    """Returns the direction that the loss's Hessian makes of a direction, and the curvature along it.

    Where the Hessian made zero of the last one, the loss being straight there, the direction is that of ``first``.
    """
    direction = direction if direction.any() else first
    length = torch.linalg.vector_norm(direction)
    if not length > 0:
        return direction, 0.0
    small = math.sqrt(torch.finfo(y.dtype).eps) * max(1.0, float(torch.linalg.vector_norm(y)))
    change = (first - slope(y + small / length * direction)) / small
    return change, float(torch.linalg.vector_norm(change))


@cache
def coefficients(stages: int) -> tuple[Stage, ...]:
    """Returns the coefficients of stages 1 to ``stages``."""
    w = 1 + DAMPING / stages**2
    t, d, dd = [1.0, w], [0.0, 1.0], [0.0, 0.0]  # Chebyshev polynomials at w, their first and second derivatives
    for _ in range(2, stages + 1):
        dd.append(4 * d[-1] + 2 * w * dd[-1] - dd[-2])
        d.append(2 * t[-1] + 2 * w * d[-1] - d[-2])
        t.append(2 * w * t[-1] - t[-2])
    scale = d[stages] / dd[stages]
    b = [0.0, 0.0, *(dd[j] / d[j] ** 2 for j in range(2, stages + 1))]
    b[0] = b[1] = b[2]
    found = [Stage(0.0, 0.0, b[1] * scale, 0.0)]
    for j in range(2, stages + 1):
        new = 2 * b[j] * scale / b[j - 1]
        found.append(Stage(2 * b[j] * w / b[j - 1], -b[j] / b[j - 2], new, -(1 - b[j - 1] * t[j - 1]) * new))
    return tuple(found)
