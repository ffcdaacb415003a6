"""What a lower-level update map is."""

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bilevel_lightning.errors import BilevelError
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params

State: TypeAlias = tuple[Params, ...]
Learn: TypeAlias = bool | Literal["per_step", "per_parameter"]


def fraction(name: str, value: float, above: float = -1.0) -> float:
    """Returns ``value`` if it is in [0, 1), and larger than ``above``.

    Raises:
        BilevelError: if it is not; the message starts with ``name``.
    """
    if not (0 <= value < 1 and value > above):
        raise BilevelError(f"{name} must be in [0, 1), got {value}." + (" Learnt, it must not be 0." * (above == 0)))
    return value


def learnt_fraction(x: Params, name: str, value: float) -> float | Tensor:
    """Returns ``sigmoid(logit(value) + theta)`` where theta is an upper variable, and ``value`` where it is not."""
    theta = x.get(f"dynamics/logit_{name}")
    if theta is None:
        return value
    return torch.sigmoid(torch.logit(torch.as_tensor(value, dtype=theta.dtype, device=theta.device)) + theta)


class Dynamics(ABC):
    """One lower step ``(y, ...) -> (y, ...)``.

    Attributes:
        rest: what holds where y rests: ``minimum``, y minimises g (over its constraints); ``fixed_point``, y is a fixed
            point of `contraction`; None: neither, so that implicit differentiation does not apply.
    """

    rest: Literal["minimum", "fixed_point"] | None = "minimum"

    def start(self, y: Params) -> State:
        """Returns the state at lower step 0: y and zeroed memories."""
        return (y,)

    @abstractmethod
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        """Returns the state after lower step ``t`` (from 0); with ``track`` differentiable in x and the state."""

    def learnable(self, steps: int, y: Params) -> Params:
        """Returns initial values of the settings that are upper variables, for T ``steps`` from y.

        Their names are ``dynamics/...``.
        """
        return {}

    def adaptation(self) -> "Dynamics":
        """Returns the dynamics of validation and test, which must not see the upper loss; default: this one."""
        return self

    def linear_step(self) -> float | None:
        """Returns a step size with which ``v - step g_yy v`` contracts if this dynamics does; None: unknown."""
        return None

    def contraction(self, problem: BilevelProblem, x: Params, y: Params, t: int = 0) -> Params:
        """Returns Phi(x, y), a differentiable map whose fixed point is the y where this dynamics rests."""
        raise BilevelError(
            f"{type(self).__name__} gives no map with fixed point y*, which implicit differentiation of a constrained "
            "lower level needs; use GradientDescent, Momentum or Nesterov as dynamics, or RHG as algorithm."
        )
