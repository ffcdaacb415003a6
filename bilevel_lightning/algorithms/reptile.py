"""Reptile."""

from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.dynamics import Dynamics, GradientDescent
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


class Reptile(BilevelModule):
    r"""Reptile: the start moves towards where the lower steps end; the upper loss is not used.

    1. y_0 = y_0(x), y_{t+1} = Phi_t(y_t), t = 0..T-1.
    2. Direction (d y_0 / d x)^T (y_0 - y_T), averaged over episodes; with SGD of step size eps,
       x <- x + eps (mean y_T - x) where y_0 = x. Variables of x that are no part of y_0 do not move.

    Args:
        upper_optimizer: default SGD with step size 1, which sets x to the mean of y_T.
        dynamics: default gradient descent with step size 0.1.
        lower_steps: default 5.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if y_0 does not depend on x.

    References:
        A. Nichol, J. Achiam, J. Schulman. On First-Order Meta-Learning Algorithms. arXiv 2018.
    """

    side_by_side = True
    estimates_hypergradient = False

    def __init__(
        self,
        *,
        upper_optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1.0),
        dynamics: Dynamics = GradientDescent(lr=0.1),  # noqa: B008 (a value: it has no state)
        lower_steps: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(upper_optimizer=upper_optimizer, dynamics=dynamics, lower_steps=lower_steps, **kwargs)

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        problem.initial(x)  # raises where there is none to learn
        end = self.solve_lower(problem, x, y)
        return Step(problem.initial_vjp(x, tree.axpy(-1.0, end, y)), end)
