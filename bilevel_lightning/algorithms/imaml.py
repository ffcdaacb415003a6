"""Implicit MAML."""

from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.dynamics import Dynamics, GradientDescent
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.hypergradients import implicit
from bilevel_lightning.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


class IMAML(BilevelModule):
    r"""Implicit MAML: each episode solves a proximal problem around y_0(x), and no step is differentiated.

    1. y: ``lower_steps`` steps of ``dynamics`` on g(x, y) + strength |y - y_0(x)|^2 / 2, from y_0(x).
    2. v with (g_yy + strength I) v = f_y, by ``linear_solver``.
    3. Hypergradient f_x - g_xy v + strength (d y_0 / d x)^T v.

    Validation and test solve the same proximal problem. Logged besides: ``train/residual`` of the linear system.

    Args:
        strength: lambda of the paper. Default 2, its value for Omniglot.
        linear_solver: default conjugate gradient, 5 steps, as in the paper.
        upper_optimizer: default Adam with step size 0.001, the paper's.
        dynamics: default gradient descent with step size 0.1.
        lower_steps: default 16, the paper's for Omniglot.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if y_0 does not depend on x, or strength is not positive.

    References:
        A. Rajeswaran, C. Finn, S. Kakade, S. Levine. Meta-Learning with Implicit Gradients. NeurIPS 2019.
    """

    estimates_hypergradient = False

    def __init__(
        self,
        *,
        strength: float = 2.0,
        linear_solver: LinearSolver = ConjugateGradient(steps=5),  # noqa: B008 (a value: it has no state)
        upper_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.001),
        dynamics: Dynamics = GradientDescent(lr=0.1),  # noqa: B008 (a value: it has no state)
        lower_steps: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(upper_optimizer=upper_optimizer, dynamics=dynamics, lower_steps=lower_steps, **kwargs)
        self.strength, self.linear_solver = positive("strength", strength), linear_solver

    def proximal(self, problem: BilevelProblem, start: Params) -> BilevelProblem:
        """Returns the problem with the proximal term around y_0."""
        return problem.blend(0.0, center=start, weight=self.strength)

    @override
    def adapt(self, problem: BilevelProblem, x: Params, y: Params) -> Iterator[Params]:
        return super().adapt(self.proximal(problem, y), x, y)

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        problem.initial(x)  # raises where there is none to learn
        if problem.constrained or self.dynamics.rest != "minimum":
            raise BilevelError(
                "IMAML needs an unconstrained lower level and dynamics that rest where it is least: use MAML, or "
                "GradientDescent as dynamics."
            )
        near = self.proximal(problem, y)
        solved = self.solve_lower(near, x, y)
        gradient, solution = implicit(near, self.dynamics, x, solved, self.linear_solver, t=self.lower_steps)
        gradient = tree.axpy(self.strength, problem.initial_vjp(x, solution.v), gradient)
        return Step(gradient, solved, {"train/residual": torch.tensor(solution.residual)})
