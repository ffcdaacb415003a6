"""Gradient descent and its relatives: momentum, Nesterov, heavy ball, aggregated descent."""

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.dynamics.base import Dynamics, Learn, State, fraction, learnt_fraction
from bilevel_lightning.errors import positive
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import InverseTime, Schedule, at, scheduled
from bilevel_lightning.tree import Params

PER_PARAMETER = "dynamics/log_lr_factors/"
"""What precedes the name of a lower variable in that of its learnt step sizes."""


class GradientDescent(Dynamics):
    r"""``y <- prox(y - lr g_y(x, y))``, the proximal map being the task's projection or the identity.

    Args:
        lr: step size, or a schedule over the lower steps of an upper iteration (`DARTS`: of the run). Default 0.1.
        learn_lr: learn the step size as an upper variable theta, ``lr exp(theta)``, from theta = 0, so that it stays
            positive; ``per_step``: one theta for each lower step, a learnt schedule; ``per_parameter``: one for each
            entry of y (Meta-SGD). Default False.

    Raises:
        BilevelError: if lr is not positive.
    """

    def __init__(self, lr: float | Schedule = 0.1, learn_lr: Learn = False) -> None:
        self.lr = scheduled(f"{type(self).__name__}.lr", lr)
        self.learn_lr = learn_lr

    def rate(self, x: Params, t: int) -> float | Tensor:
        """Returns the step size at lower step ``t``, without what is learnt for each parameter."""
        lr = at(self.lr, t)
        if not self.learn_lr or "dynamics/log_lr_factor" not in x:
            return lr
        theta = x["dynamics/log_lr_factor"]
        return lr * (theta[min(t, len(theta) - 1)] if theta.ndim else theta).exp()

    @override
    def learnable(self, steps: int, y: Params) -> Params:
        if self.learn_lr == "per_parameter":
            return {f"{PER_PARAMETER}{name}": torch.zeros(t.shape) for name, t in y.items()}
        size = (steps,) if self.learn_lr == "per_step" else ()
        return {"dynamics/log_lr_factor": torch.zeros(size)} if self.learn_lr else {}

    def descend(self, x: Params, y: Params, direction: Params, lr: float | Tensor) -> Params:
        """Returns ``y - lr direction``, lr times what is learnt for each parameter."""
        if self.learn_lr == "per_parameter":
            direction = {name: x[PER_PARAMETER + name].exp() * t for name, t in direction.items()}
        return tree.axpy(-lr, direction, y)

    @override
    def linear_step(self) -> float | None:
        return at(self.lr, 0)

    @override
    def contraction(self, problem: BilevelProblem, x: Params, y: Params, t: int = 0) -> Params:
        lr = self.rate(x, 0)
        return problem.prox(x, self.descend(x, y, problem.grad_g(x, y, t, track=True), lr), lr)

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        y, *memory = state
        lr = self.rate(x, t)
        direction, memory = self.direction(x, problem.grad_g(x, y, t, track=track), memory, t)
        return (problem.prox(x, self.descend(x, y, direction, lr), lr), *memory)

    def direction(self, x: Params, g_y: Params, memory: list[Params], t: int) -> tuple[Params, list[Params]]:
        """Returns the descent direction and the new memories."""
        return g_y, memory


class Momentum(GradientDescent):
    r"""Gradient descent with momentum in torch's convention: ``m <- mu m + g_y``, ``y <- prox(y - lr m)``, m_0 = 0.

    Args:
        lr: as in `GradientDescent`.
        momentum: mu in [0, 1). Default 0.9.
        learn_lr: as in `GradientDescent`.
        learn_momentum: learn mu as an upper variable theta, ``mu = sigmoid(logit(momentum) + theta)``. Default False.

    Raises:
        BilevelError: if momentum is outside [0, 1) or lr is not positive.
    """

    def __init__(
        self,
        lr: float | Schedule = 0.1,
        momentum: float = 0.9,
        learn_lr: Learn = False,
        learn_momentum: bool = False,
    ) -> None:
        super().__init__(lr, learn_lr)
        self.momentum = fraction(f"{type(self).__name__}.momentum", momentum, 0.0 if learn_momentum else -1.0)
        self.learn_momentum = learn_momentum

    def factor(self, x: Params) -> float | Tensor:
        """Returns mu."""
        return learnt_fraction(x, "momentum", self.momentum)

    @override
    def learnable(self, steps: int, y: Params) -> Params:
        own = {"dynamics/logit_momentum": torch.zeros(())} if self.learn_momentum else {}
        return {**super().learnable(steps, y), **own}

    @override
    def start(self, y: Params) -> State:
        return (y, tree.zeros_like(y))

    @override
    def direction(self, x: Params, g_y: Params, memory: list[Params], t: int) -> tuple[Params, list[Params]]:
        m = tree.axpy(self.factor(x), memory[0], g_y)
        return m, [m]


class Nesterov(Momentum):
    r"""Nesterov momentum in torch's convention: ``m <- mu m + g_y``, ``y <- prox(y - lr (g_y + mu m))``.

    Args:
        lr: as in `GradientDescent`.
        momentum: mu in [0, 1). Default 0.9.
        learn_lr: as in `GradientDescent`.
        learn_momentum: as in `Momentum`.
    """

    @override
    def direction(self, x: Params, g_y: Params, memory: list[Params], t: int) -> tuple[Params, list[Params]]:
        mu = self.factor(x)
        m = tree.axpy(mu, memory[0], g_y)
        return tree.axpy(mu, m, g_y), [m]


class HeavyBall(Momentum):
    r"""Polyak's heavy ball: ``y_{t+1} = prox(y_t - lr_t g_y + mu (y_t - y_{t-1}))``, y_{-1} = y_0.

    Without proximal map and with a constant step it moves as `Momentum` does.

    Args:
        lr: as in `GradientDescent`.
        momentum: mu in [0, 1). Default 0.9.
        learn_lr: as in `GradientDescent`.
        learn_momentum: as in `Momentum`.

    References:
        B. T. Polyak. Some methods of speeding up the convergence of iteration methods. USSR Computational Mathematics
        and Mathematical Physics, 1964.
    """

    @override
    def start(self, y: Params) -> State:
        return (y, tree.zeros_like(y))

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        y, change = state
        lr = self.rate(x, t)
        moved = tree.axpy(self.factor(x), change, y)
        after = problem.prox(x, self.descend(x, moved, problem.grad_g(x, y, t, track=track), lr), lr)
        return after, tree.axpy(-1.0, y, after)


class Accelerated(GradientDescent):
    r"""Nesterov's accelerated gradient for convex g, with a momentum that grows (FISTA).

    ``y_{k+1} = prox(u_k - lr g_y(x, u_k))``, ``u_{k+1} = y_{k+1} + (t_k - 1) / t_{k+1} (y_{k+1} - y_k)``; u_0 = y_0,
    t_0 = 1, ``t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2``.

    Args:
        lr: as in `GradientDescent`, at most 1 / L for a g with L-Lipschitz gradient.
        learn_lr: as in `GradientDescent`.

    References:
        A. Beck, M. Teboulle. A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems. SIAM
        Journal on Imaging Sciences, 2009.
    """

    @override
    def start(self, y: Params) -> State:
        return (y, tree.zeros_like(y))

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        y, change = state
        lr, before, now = self.rate(x, t), 1.0, 1.0
        for _ in range(t):
            before, now = now, (1 + (1 + 4 * now**2) ** 0.5) / 2
        u = tree.axpy((before - 1) / now, change, y)
        after = problem.prox(x, self.descend(x, u, problem.grad_g(x, u, t, track=track), lr), lr)
        return after, tree.axpy(-1.0, y, after)


class AggregatedDescent(GradientDescent):
    r"""The aggregated steps of BDA: ``y <- prox(y - (alpha_t upper_lr f_y + (1 - alpha_t) lr g_y))``.

    Where g has many minimisers, the share of f selects among them; with a fixed alpha y rests away from argmin g (its
    limit on a quadratic is in tests/test_dynamics.py), so alpha decreases by default.

    Args:
        lr: step size on g, or a schedule. Default 0.1.
        upper_lr: step size on f. Default 0.1.
        alpha: share of f in (0, 1), or a schedule over the lower steps. None (default): 0.5 / (1 + t).
        learn_lr: as in `GradientDescent`, for ``lr``.

    Raises:
        BilevelError: if a setting is out of its range.

    References:
        R. Liu, P. Mu, X. Yuan, S. Zeng, J. Zhang. A Generic First-Order Algorithmic Framework for Bi-Level Programming
        Beyond Lower-Level Singleton. ICML 2020.
    """

    rest = None

    def __init__(
        self,
        lr: float | Schedule = 0.1,
        upper_lr: float = 0.1,
        alpha: float | Schedule | None = None,
        learn_lr: Learn = False,
    ) -> None:
        super().__init__(lr, learn_lr)
        self.upper_lr = positive("AggregatedDescent.upper_lr", upper_lr)
        alpha = InverseTime(0.5, 1.0) if alpha is None else alpha
        self.alpha = alpha if isinstance(alpha, Schedule) else fraction("AggregatedDescent.alpha", alpha)

    @override
    def adaptation(self) -> Dynamics:
        """Returns gradient descent on g alone: at test time f holds the labels to predict."""
        return GradientDescent(self.lr, self.learn_lr)

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        (y,) = state
        alpha = at(self.alpha, t)
        lr = self.rate(x, t)
        moved = self.descend(x, y, problem.grad_g(x, y, t, track=track), (1 - alpha) * lr)
        moved = tree.axpy(-alpha * self.upper_lr, problem.grad_f_y(x, y, track=track), moved)
        return (problem.prox(x, moved, (1 - alpha) * lr),)
