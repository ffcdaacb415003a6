r"""Lower-level update maps: how y moves towards argmin_y g(x, y), differentiably.

A dynamics is a value without state of its own. The state of the lower level, a tuple of named tensors whose first entry
is y, is passed in and out, so that an unrolled differentiation may store it, restart from it and differentiate through
it, and so that its settings may be learnt as upper variables (``learn_lr``).
"""

from abc import ABC, abstractmethod
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule
from bilevel_lightning.tree import Params

State: TypeAlias = tuple[Params, ...]
LOG_FACTOR = "dynamics/log_lr_factor"


class Dynamics(ABC):
    """One lower step ``(y, ...) -> (y, ...)``."""

    def start(self, y: Params) -> State:
        """Returns the state at lower step 0: y and zeroed memories."""
        return (y,)

    @abstractmethod
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        """Returns the state after lower step ``t`` (from 0); with ``track`` differentiable in x and the state."""

    def learnable(self) -> Params:
        """Returns initial values of the settings that are upper variables, named ``dynamics/...``."""
        return {}


class GradientDescent(Dynamics):
    r"""``y <- prox(y - lr g_y(x, y))``, the proximal map being the task's projection or the identity.

    Args:
        lr: step size, or a schedule over the lower steps. Default 0.1.
        learn_lr: learn the step size as an upper variable theta, ``lr exp(theta)``, from theta = 0. It stays positive.

    Raises:
        BilevelError: if lr is not positive.
    """

    def __init__(self, lr: float | Schedule = 0.1, learn_lr: bool = False) -> None:
        self.lr = lr if isinstance(lr, Schedule) else positive(f"{type(self).__name__}.lr", lr)
        self.learn_lr = learn_lr

    def rate(self, x: Params, t: int) -> float | Tensor:
        """Returns the step size at lower step ``t``."""
        lr = self.lr(t) if isinstance(self.lr, Schedule) else self.lr
        return lr * x[LOG_FACTOR].exp() if LOG_FACTOR in x else lr

    @override
    def learnable(self) -> Params:
        return {LOG_FACTOR: torch.zeros(())} if self.learn_lr else {}

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        y, *memory = state
        lr = self.rate(x, t)
        direction, memory = self.direction(problem.grad_g(x, y, t, track=track), memory, t)
        return (problem.prox(x, tree.axpy(-lr, direction, y), lr), *memory)

    def direction(self, g_y: Params, memory: list[Params], t: int) -> tuple[Params, list[Params]]:
        """Returns the descent direction and the new memories."""
        return g_y, memory


class Momentum(GradientDescent):
    r"""Gradient descent with momentum in torch's convention: ``m <- mu m + g_y``, ``y <- prox(y - lr m)``, m_0 = 0.

    Args:
        lr: as in `GradientDescent`.
        momentum: mu in [0, 1). Default 0.9.
        learn_lr: as in `GradientDescent`.

    Raises:
        BilevelError: if momentum is outside [0, 1) or lr is not positive.
    """

    def __init__(self, lr: float | Schedule = 0.1, momentum: float = 0.9, learn_lr: bool = False) -> None:
        super().__init__(lr, learn_lr)
        if not 0 <= momentum < 1:
            raise BilevelError(f"{type(self).__name__}.momentum must be in [0, 1), got {momentum}.")
        self.momentum = momentum

    @override
    def start(self, y: Params) -> State:
        return (y, tree.zeros_like(y))

    @override
    def direction(self, g_y: Params, memory: list[Params], t: int) -> tuple[Params, list[Params]]:
        m = tree.axpy(self.momentum, memory[0], g_y)
        return m, [m]


class Nesterov(Momentum):
    r"""Nesterov momentum in torch's convention: ``m <- mu m + g_y``, ``y <- prox(y - lr (g_y + mu m))``.

    Args:
        lr: as in `GradientDescent`.
        momentum: mu in [0, 1). Default 0.9.
        learn_lr: as in `GradientDescent`.
    """

    @override
    def direction(self, g_y: Params, memory: list[Params], t: int) -> tuple[Params, list[Params]]:
        m = tree.axpy(self.momentum, memory[0], g_y)
        return tree.axpy(self.momentum, m, g_y), [m]


class Adam(GradientDescent):
    r"""Adam (Kingma & Ba, ICLR 2015), differentiable.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``y <- prox(y - lr m / (1 - b1^(t+1)) / (sqrt(v / (1 - b2^(t+1))) + eps))``.

    Where v = 0 every gradient so far was zero; the derivative of the square root, infinite there, is multiplied by m =
    0, and we take the product as 0 (it would be NaN otherwise).

    Args:
        lr: as in `GradientDescent`. Default 0.001, the paper's.
        betas: b1 and b2 in [0, 1). Default (0.9, 0.999), the paper's.
        eps: added to the root. Default 1e-8, the paper's.
        learn_lr: as in `GradientDescent`.

    Raises:
        BilevelError: if a setting is out of its range.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        learn_lr: bool = False,
    ) -> None:
        super().__init__(lr, learn_lr)
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise BilevelError(f"Adam.betas must be in [0, 1), got {betas}.")
        self.betas, self.eps = betas, positive("Adam.eps", eps)

    @override
    def start(self, y: Params) -> State:
        return (y, tree.zeros_like(y), tree.zeros_like(y))

    @override
    def direction(self, g_y: Params, memory: list[Params], t: int) -> tuple[Params, list[Params]]:
        b1, b2 = self.betas
        m = {name: torch.lerp(g, memory[0][name], b1) for name, g in g_y.items()}
        v = {name: torch.lerp(g * g, memory[1][name], b2) for name, g in g_y.items()}
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        return {name: m[name] / c1 / (self._root(v[name] / c2) + self.eps) for name in m}, [m, v]

    @staticmethod
    def _root(v: Tensor) -> Tensor:
        zero = v == 0
        return v.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


class FixedPoint(Dynamics):
    """``y <- Phi(x, y)``, the task's `fixed_point_map` (equilibrium models; Phi should contract in y)."""

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        with torch.set_grad_enabled(track):
            return (problem.fixed_point(x, state[0], t),)
