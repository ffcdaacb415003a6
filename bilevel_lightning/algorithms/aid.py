"""Approximate implicit differentiation (AID), with any linear solver, and its named forms."""

from typing import Any

import torch
from typing_extensions import override

from bilevel_lightning import linear_solvers
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.hypergradients import implicit
from bilevel_lightning.linear_solvers import ConjugateGradient, FixedPointIteration, LinearSolver, Neumann
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.task import Draws
from bilevel_lightning.tree import Params


class AID(BilevelModule):
    r"""Approximate implicit differentiation: memory independent of T.

    1. y: ``lower_steps`` steps of ``dynamics``.
    2. v with g_yy(x, y) v = f_y(x, y), by ``linear_solver``.
    3. Hypergradient f_x - g_xy v.

    With a fixed-point map, or a projection or proximal map of the lower level, whose step is y = Phi(x, y):
    (I - Phi_y^T) v = f_y and f_x + Phi_x^T v. Logged besides: ``train/residual``, relative, of the linear system.

    Args:
        linear_solver: one of `bilevel_lightning.linear_solvers`. Default conjugate gradient, 20 steps.
        warm_start_linear: start the linear solver at the last iteration's v; one more product; y must persist. Default
            False.
        **kwargs: settings of `BilevelModule`; ``lower_steps`` may be 0, where y is moved by other means.

    Raises:
        BilevelError: if dynamics has learnt settings, on which y* does not depend, or does not rest where g is least;
            or if v is not finite, or is to be warm-started where y does not persist.

    Warns:
        LinearSystemWarning: if the linear system is singular, indefinite or diverging, or f_y is zero.

    References:
        F. Pedregosa. Hyperparameter optimization with approximate gradient. ICML 2016.
        R. Grazzi, L. Franceschi, M. Pontil, S. Salzo. On the Iteration Complexity of Hypergradient Computation. ICML
        2020.
    """

    least_lower_steps = 0

    def __init__(
        self,
        *,
        linear_solver: LinearSolver = ConjugateGradient(),  # noqa: B008 (a value: it has no state)
        warm_start_linear: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        learnt = sorted(self.dynamics.learnable(1, {"y": torch.zeros(1)}))
        if learnt:
            raise BilevelError(
                f"{type(self).__name__} differentiates y*, which does not depend on {learnt}: do not learn settings of "
                "dynamics, or use RHG."
            )
        if self.dynamics.rest is None:
            raise BilevelError(
                f"{type(self).__name__} needs dynamics that rest where the lower loss is least, and "
                f"{type(self.dynamics).__name__} mixes in the upper loss: use RHG, or GradientDescent as dynamics."
            )
        self.linear_solver, self.warm_start_linear = linear_solver, warm_start_linear

    @override
    def configure_model(self) -> None:
        if self.warm_start_linear and not self.hooks.persistent_lower and not self.hooks.stored_lowers:
            raise BilevelError(
                f"{type(self).__name__}: warm_start_linear goes on from the last v, and this task solves y anew for "
                "each episode: set warm_start_linear to False, or store y and v of each (FewShot.stored_heads)."
            )
        super().configure_model()

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        return {"v": {name: torch.zeros_like(t) for name, t in y.items()}} if self.warm_start_linear else {}

    @override
    def minibatches(self, k: int) -> tuple[Draws, Draws]:
        return self.lower_steps + self.linear_solver.samples + 1, 1

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        y, start = self.solve_lower(problem, x, y), self.kept("v")
        gradient, solution = implicit(problem, self.dynamics, x, y, self.linear_solver, start=start, t=self.lower_steps)
        residual = torch.tensor(solution.residual, device=next(iter(y.values())).device)
        return Step(gradient, y, {"train/residual": residual}, {} if start is None else {"v": solution.v})


class AIDCG(AID):
    r"""`AID` by conjugate gradient (AID-CG).

    Args:
        linear_solver: its settings. Default 20 steps, relative residual 1e-10.
        **kwargs: settings of `AID`.

    References:
        F. Pedregosa. Hyperparameter optimization with approximate gradient. ICML 2016.
    """

    def __init__(self, *, linear_solver: ConjugateGradient = ConjugateGradient(), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(linear_solver=linear_solver, **kwargs)


class AIDNeumann(AID):
    r"""`AID` by a truncated Neumann series (AID-NS): v = lr sum_{i=0..K} (I - lr g_yy)^i f_y.

    Args:
        linear_solver: its settings. Default K = 20 with the step size of the dynamics.
        **kwargs: settings of `AID`.

    References:
        J. Lorraine, P. Vicol, D. Duvenaud. Optimizing Millions of Hyperparameters by Implicit Differentiation.
        AISTATS 2020.
    """

    def __init__(self, *, linear_solver: Neumann = Neumann(), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(linear_solver=linear_solver, **kwargs)


class AIDFP(AID):
    r"""`AID` by fixed-point iteration (AID-FP): v <- v - lr (g_yy v - f_y).

    Args:
        linear_solver: its settings. Default 20 steps with the step size of the dynamics.
        **kwargs: settings of `AID`.

    References:
        R. Grazzi, L. Franceschi, M. Pontil, S. Salzo. On the Iteration Complexity of Hypergradient Computation. ICML
        2020.
    """

    def __init__(self, *, linear_solver: FixedPointIteration = FixedPointIteration(), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(linear_solver=linear_solver, **kwargs)


class Nystrom(AID):
    r"""`AID` by a Nystroem approximation of the Hessian: no iteration, no step size, damping instead.

    Args:
        linear_solver: its settings. Default 10 columns, damping 0.01.
        **kwargs: settings of `AID`.

    References:
        R. Hataya, M. Yamada. Nystroem Method for Accurate and Scalable Implicit Differentiation. AISTATS 2023.
    """

    def __init__(
        self,
        *,
        linear_solver: linear_solvers.Nystrom = linear_solvers.Nystrom(),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(linear_solver=linear_solver, **kwargs)
