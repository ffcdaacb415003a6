"""Bilevel optimization made easy: the dynamic barrier on the value gap."""

from typing import Any, Literal, get_args

import torch
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.algorithms.penalty import SingleLoop
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule
from bilevel_lightning.tree import Params

Barrier = Literal["gradient", "value"]


class BOME(SingleLoop):
    r"""Dynamic barrier descent on f under q(x, y) = g(x, y) - g(x, w) <= 0; no penalty parameter to choose.

    1. w: ``lower_steps`` steps of ``dynamics`` from y.
    2. q_x = g_x(x, y) - g_x(x, w),  q_y = g_y(x, y); the twin w is held fixed.
    3. lambda = max(phi - <(f_x, f_y), (q_x, q_y)>, 0) / |(q_x, q_y)|^2, phi = eta |(q_x, q_y)|^2 or eta q: the least
       multiple with which q falls at the rate phi.
    4. d = (f_x, f_y) + lambda (q_x, q_y); x steps by ``upper_optimizer``, y <- y - lower_lr d_y.

    First derivatives only. Near the solution |(q_x, q_y)| tends to 0 and lambda grows, so that y is restless on the
    scale of its step: let the steps decrease for accuracy. One batch of several starts shares one lambda;
    episodes with a y of their own have each their own. Logged besides: ``train/gap``, q, and ``train/multiplier``,
    lambda.

    Args:
        eta: rate of the barrier. Default 0.5, the paper's.
        barrier: ``gradient`` (default): phi = eta |(q_x, q_y)|^2; ``value``: phi = eta q.
        lower_lr: step size of y, or a schedule over the upper iterations. Default 0.03.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if a setting is out of its range, y does not persist, the gap is clearly negative, or the lower
            level has a projection or proximal map, at whose solution q_y does not vanish.

    References:
        B. Liu, M. Ye, S. Wright, P. Stone, Q. Liu. BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach.
        NeurIPS 2022.
    """

    divisible = True

    def __init__(
        self, *, eta: float = 0.5, barrier: Barrier = "gradient", lower_lr: float | Schedule = 0.03, **kwargs: Any
    ) -> None:
        super().__init__(lower_lr=lower_lr, **kwargs)
        if barrier not in get_args(Barrier):
            raise BilevelError(f"barrier must be 'gradient' or 'value', got {barrier!r}.")
        self.eta, self.barrier = positive("eta", eta), barrier

    @override
    def minibatches(self, k: int) -> tuple[int, int]:
        return self.lower_steps + 1, 1

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        if problem.constrained:
            raise BilevelError(
                "BOME weighs f against the gradient of the value gap, which does not vanish at the solution of a lower "
                "level with a projection or proximal map: use VPBGD or MEHA."
            )
        t = self.lower_steps
        w = self.solve_lower(problem, x, y)
        f_x, f_y = problem.grad_f(x, y)
        value, g_x, q_y = problem.values_and_gradients(x, y, t)
        solved, v_x, _ = problem.values_and_gradients(x, w, t, lower=False)
        q_x, q = tree.axpy(-1.0, v_x, g_x), self.check_gap(value, solved)
        square = tree.dot(q_x, q_x) + tree.dot(q_y, q_y)
        phi = self.eta * (square if self.barrier == "gradient" else q)
        inner = tree.dot(f_x, q_x) + tree.dot(f_y, q_y)
        multiplier = (phi - inner).clamp(min=0) / square.clamp(min=torch.finfo(square.dtype).tiny)
        d_x, d_y = tree.axpy(multiplier, q_x, f_x), tree.axpy(multiplier, q_y, f_y)
        logs = {"train/gap": q, "train/multiplier": multiplier}
        return Step(d_x, self.move(problem, x, y, d_y, float(multiplier)), logs)
