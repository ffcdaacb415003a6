"""Fully first-order approximation of the hypergradient, of first and second order."""

from typing import Any, Literal

from typing_extensions import override

from bilevel_lightning.errors import BilevelError
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule, at, scheduled
from bilevel_lightning.tree import Params


class F2SA(BilevelModule):
    r"""The hypergradient as a difference of penalised lower levels, without second derivatives (F2SA, F2SA-2).

    With l(nu, x) = min_y nu f(x, y) + g(x, y), the hypergradient is d/dnu of l_x at nu = 0. Here nu = 1 / gamma.

    1. y: ``lower_steps`` steps of ``dynamics`` on g + f / gamma.
    2. z: as many on g (order 1), or on g - f / gamma (order 2). Both go on from their last iterates.
    3. Order 1, forward difference, error O(1 / gamma):
       d_x = f_x(x, y) + gamma (g_x(x, y) - g_x(x, z)).
       Order 2, central difference, error O(1 / gamma^2):
       d_x = (f_x(x, y) + f_x(x, z)) / 2 + gamma (g_x(x, y) - g_x(x, z)) / 2.

    ``lower_steps`` 1 is the single-loop form, more the double-loop form. Logged besides: ``train/gap``,
    g(x, y) - g(x, z), and ``train/gamma``.

    Args:
        gamma: penalty parameter, lambda in the paper, or a schedule over the upper iterations, such as
            ``Power(1, 1/7)``, the exponent of the paper. For order 2, g - f / gamma must stay convex in y. Default 10.
        order: 1 or 2. Default 2, which costs as much as order 1 but for one gradient of f.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if gamma is not positive or order is not 1 or 2.

    References:
        J. Kwon, D. Kwon, S. Wright, R. D. Nowak. A Fully First-Order Method for Stochastic Bilevel Optimization. ICML
        2023. Order 2: the p-th order differences of F2SA-p, arXiv 2509.02937, ICLR 2026.
    """

    divisible = True
    upper_rates = "upper_optimizer.lr or dynamics.lr, or raise lower_steps"

    def __init__(self, *, gamma: float | Schedule = 10.0, order: Literal[1, 2] = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if order not in (1, 2):
            raise BilevelError(f"order must be 1 or 2, got {order}.")
        self.gamma, self.order = scheduled("gamma", gamma), order

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        return {"z": y} if self.warm_start else {}

    @override
    def minibatches(self, k: int) -> tuple[int, int]:
        return self.lower_steps + 1, 1

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        gamma, kept, t = at(self.gamma, self.global_step), self.kept("z"), self.lower_steps
        start = y if kept is None else kept
        y = self.solve_lower(problem.blend(1 / gamma), x, y)
        z = self.solve_lower(problem if self.order == 1 else problem.blend(-1 / gamma), x, start)
        value, g_x, _ = problem.values_and_gradients(x, y, t, lower=False)
        solved, v_x, _ = problem.values_and_gradients(x, z, t, lower=False)
        f_x = problem.grad_f_x(x, y)
        if self.order == 2:
            other = problem.grad_f_x(x, z)
            f_x, gamma = {n: (f_x[n] + other[n]) / 2 for n in x}, gamma / 2
        d_x = {n: f_x[n] + gamma * (g_x[n] - v_x[n]) for n in x}
        logs = {"train/gap": value - solved, "train/gamma": value.new_tensor(gamma * self.order)}
        return Step(d_x, y, logs, {} if kept is None else {"z": z})
