"""Stochastic implicit differentiation in double loops: BSGM and its relatives."""

import math
import warnings
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from typing_extensions import override

from bilevel_lightning.algorithms.aid import AID
from bilevel_lightning.errors import BilevelError, Diverged
from bilevel_lightning.hypergradients import implicit
from bilevel_lightning.hypergradients.implicit import LinearSystemWarning
from bilevel_lightning.linear_solvers import FixedPointIteration, LinearSolver
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule, at, scheduled
from bilevel_lightning.task import Draws
from bilevel_lightning.tree import Params

Count: TypeAlias = int | Schedule


class BSGM(AID):
    r"""Bilevel stochastic gradient method; each gradient and product below takes a fresh lower minibatch.

    In upper iteration s, with T, K, J constant or functions of s:

    1. y: T steps of ``dynamics`` from the y of the beginning (``warm_start``: from the last one).
    2. v: from rho_0 f_y, for j = 1..K:  v <- v - rho_j (g_yy v - f_y). With ``warm_start_linear`` from the last one,
       for j = 0..K-1.
    3. Hypergradient f_x - g_xy v, with g_xy over J minibatches, and f over J too where it comes in minibatches.

    Where y is a fixed point of Phi, or constrained, g_yy is I - Phi_y^T and -g_xy is Phi_x^T. The samples touched in an
    iteration are b (T + K + J) of the lower level, in batches of b, and those of f.

    Where v diverges, the iteration falls back to K = 0 with a warning: v = rho_0 f_y; of episodes that are solved side
    by side all do, and ``train/residual`` is that of their linear systems as one.

    Args:
        lower_steps: T, or a schedule over s, rounded up. Default 50.
        linear_steps: K, or a schedule. Default T.
        cross_samples: J, or a schedule; at least 1. Default K.
        linear_lr: rho, or a schedule over j. Default: the step size of ``dynamics``, with its schedule; 1 for a Phi.
        linear_start: ``step`` (default): v starts at rho_0 f_y, a step from zero. ``rhs``: at f_y itself, as in the
            released code where the lower level is stated by a loss, though its scale is then that of f_y.
        lower_decay: factor of the lower step size, a schedule over s. Default none.
        order: ``sequential`` (default): v at the y after its T steps, the hypergradient at both. ``simultaneous``: at
            the y before its steps, and, where v is warm-started, with the v before its steps.
        warm_start: as in `BilevelModule`. Default False, as in the paper: the hypergradient is then one of x alone.
        warm_start_linear: as in `AID`; needs K of at least 1. Default False.
        **kwargs: settings of `BilevelModule`. The paper's steps fall as ``InverseTime`` for dynamics.lr.

    Raises:
        BilevelError: if a setting is impossible.

    References:
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023.
    """

    side_by_side = True

    def __init__(
        self,
        *,
        lower_steps: Count = 50,
        linear_steps: Count | None = None,
        cross_samples: Count | None = None,
        linear_lr: float | Schedule | None = None,
        linear_start: Literal["step", "rhs"] = "step",
        lower_decay: Schedule | None = None,
        order: Literal["sequential", "simultaneous"] = "sequential",
        warm_start: bool = False,
        warm_start_linear: bool = False,
        **kwargs: Any,
    ) -> None:
        steps = lower_steps if isinstance(lower_steps, int) else _count(lower_steps, 0)
        super().__init__(lower_steps=steps, warm_start=warm_start, warm_start_linear=warm_start_linear, **kwargs)
        given = {"linear_steps": (linear_steps, 0), "cross_samples": (cross_samples, 1)}
        for name, (value, least) in given.items():
            if isinstance(value, int) and value < least:
                raise BilevelError(f"{name} must be at least {least}, got {value}.")
        if linear_steps == 0 and warm_start_linear:
            raise BilevelError("linear_steps is 0 and warm_start_linear would keep v at zero: raise linear_steps.")
        if lower_decay is not None and (self.dynamics.rest != "minimum" or self.dynamics.linear_step() is None):
            raise BilevelError(
                f"lower_decay scales the lower loss, and the steps of {type(self.dynamics).__name__} do not scale with "
                "it: set lower_decay to None, or use GradientDescent, Momentum or their like as dynamics."
            )
        for name, choice, choices in (
            ("linear_start", linear_start, ("step", "rhs")),
            ("order", order, ("sequential", "simultaneous")),
        ):
            if choice not in choices:
                raise BilevelError(f"{name} must be {choices[0]} or {choices[1]}, got {choice}.")
        self.steps, self.linear_steps, self.cross_samples = lower_steps, linear_steps, cross_samples
        self.linear_lr = linear_lr if linear_lr is None else scheduled("linear_lr", linear_lr)
        self.linear_start, self.lower_decay, self.order = linear_start, lower_decay, order

    def numbers(self, k: int) -> tuple[int, int, int]:
        """Returns T, K and J of upper iteration ``k``."""
        steps = _count(self.steps, k)
        linear = steps if self.linear_steps is None else _count(self.linear_steps, k)
        return steps, linear, max(1, linear if self.cross_samples is None else _count(self.cross_samples, k))

    @override
    def minibatches(self, k: int) -> tuple[Draws, Draws]:
        steps, linear, cross = self.numbers(k)
        return [1] * (steps + linear) + [cross], [cross]

    def solver(self, steps: int, problem: BilevelProblem, warm: bool) -> LinearSolver:
        """Returns what solves the linear system with ``steps`` products."""
        first = 1.0 if self.linear_start == "rhs" else None
        return FixedPointIteration(steps + (not warm), tol=0.0, lr=self._linear_lr(problem), first=first)

    def _linear_lr(self, problem: BilevelProblem) -> float | Schedule | None:
        if self.linear_lr is not None or problem.constrained or self.dynamics.rest != "minimum":
            return self.linear_lr
        step = self.dynamics.linear_step()
        if step is None:
            raise BilevelError(
                f"linear_lr must be given: {type(self.dynamics).__name__} has no step size that suits a linear system."
            )
        return getattr(self.dynamics, "lr", step)

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        start = self.kept("v")
        steps, linear, _ = self.numbers(self.batches)  # of which `minibatches` prepared the data
        decay = 1.0 if self.lower_decay is None else at(self.lower_decay, self.global_step)
        lower = problem if self.lower_decay is None or not decay else problem.blend(0.0, decay)
        moved = self.solve_lower(lower, x, y, steps) if decay else y
        at_once = self.order == "simultaneous"
        near = y if at_once else moved
        at_y = partial(implicit, problem, self.dynamics, x, near, t=steps, cross=linear, before=at_once)
        try:
            gradient, solution = at_y(self.solver(linear, problem, start is not None), start=start)
        except Diverged:
            warnings.warn(
                f"{type(self).__name__}: v diverged, so that linear_steps was taken as 0: lower linear_lr.",
                LinearSystemWarning,
                stacklevel=2,
            )
            gradient, solution = at_y(self.solver(0, problem, False))
        residual = torch.tensor(solution.residual, device=next(iter(y.values())).device)
        return Step(gradient, moved, {"train/residual": residual}, {} if start is None else {"v": solution.v})


def _count(value: Count, k: int) -> int:
    return value if isinstance(value, int) else math.ceil(value(k))
