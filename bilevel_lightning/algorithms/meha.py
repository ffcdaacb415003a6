"""Single-loop and Hessian-free through the Moreau envelope of the lower level."""

from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.algorithms.penalty import SingleLoop
from bilevel_lightning.dynamics import Dynamics, GradientDescent
from bilevel_lightning.errors import positive
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule, at, scheduled
from bilevel_lightning.tree import Params


class MEHA(SingleLoop):
    r"""Moreau-envelope-based Hessian-free algorithm, for lower levels that need be neither convex nor smooth.

    The gap g(x, y) - v_gamma(x, y), with v_gamma(x, y) = min_theta g(x, theta) + |theta - y|^2 / (2 gamma), is
    penalised with the weight c_k:

    1. theta <- prox(theta - eta (g_y(x, theta) + (theta - y) / gamma)): ``lower_steps`` steps of ``dynamics``.
    2. d_x = f_x(x, y) / c_k + g_x(x, y) - g_x(x, theta); x steps by ``upper_optimizer``.
    3. At the new x: d_y = f_y(x, y) / c_k + g_y(x, y) - (y - theta) / gamma; y <- prox(y - beta d_y).

    g_x includes the derivative of a nonsmooth term, and prox its map. First derivatives only, one of each level at y.
    Where a task stores the y of its episodes (`Bilevel.stored_lowers`), each has its own theta, and an iteration moves
    those of the batch: with all N tasks in it, this is MEHA with f their mean, g their sum, c / N for c and, where x
    steps by SGD, its step size over N for that.

    The released scripts multiply f by a weight that grows, keep the known solution in the update, or restart theta;
    none of that is here. Logged besides: ``train/gap``, g(x, y) - g(x, theta) - |theta - y|^2 / (2 gamma).

    Args:
        gamma: of the envelope; g + |.|^2 / (2 gamma) should be convex in y. Default 1.
        c: weight c_k of the gap, or a schedule over the upper iterations; the paper takes
            ``Power(c, p)`` with p below 1/2. Default 5.
        lower_lr: step size beta of y, or a schedule over the upper iterations. Default 0.1.
        upper_optimizer: optimizer of x. Default SGD with step size 0.2.
        dynamics: of theta; its step size is eta. Default gradient descent with step size 0.1.
        lower_steps: steps of theta in one upper iteration. Default 1, the paper's.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if a setting is out of its range, or y does not persist.

    References:
        R. Liu, Z. Liu, W. Yao, S. Zeng, J. Zhang. Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-Loop
        and Hessian-Free Solution Strategy. ICML 2024.
    """

    divisible = True
    side_by_side = True

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        c: float | Schedule = 5.0,
        lower_lr: float | Schedule = 0.1,
        upper_optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.2),
        dynamics: Dynamics = GradientDescent(lr=0.1),  # noqa: B008 (a value: it has no state)
        lower_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            lower_lr=lower_lr, upper_optimizer=upper_optimizer, dynamics=dynamics, lower_steps=lower_steps, **kwargs
        )
        self.gamma, self.c = positive("gamma", gamma), scheduled("c", c)

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        return {"theta": y}

    @override
    def minibatches(self, k: int) -> tuple[int, int]:
        return self.lower_steps + 1, 1

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        k, t, theta = self.global_step, self.lower_steps, self.kept("theta")
        weight, lr = 1 / at(self.c, k), at(self.lower_lr, k)
        theta = self.solve_lower(problem.blend(0.0, center=y, weight=1 / self.gamma), x, y if theta is None else theta)
        f_x = problem.grad_f_x(x, y)
        value, g_x, _ = problem.values_and_gradients(x, y, t, lower=False)
        solved, v_x, _ = problem.values_and_gradients(x, theta, t, lower=False)
        d_x = {n: weight * f_x[n] + g_x[n] - v_x[n] for n in x}
        apart = tree.axpy(-1.0, theta, y)
        gap = value - solved - problem.square(apart) / (2 * self.gamma)

        def lower(problem: BilevelProblem, x: Params) -> Params:
            d_y = tree.axpy(-1 / self.gamma, apart, problem.blend(weight).grad_g(x, y, t))
            return problem.prox(x, tree.axpy(-lr, d_y, y), lr)

        return Step(d_x, lower, {"train/gap": gap}, {"theta": theta})
