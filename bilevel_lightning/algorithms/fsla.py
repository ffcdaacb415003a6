"""FSLA: one step each of y, v and x in turn, with momentum on x."""

from typing import Any

from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.algorithms.estimated import joined, part
from bilevel_lightning.algorithms.soba import SOBA
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.estimators import STORM, Estimator, Term
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Power, at
from bilevel_lightning.task import Draws
from bilevel_lightning.tree import Params


class FSLA(SOBA):
    r"""FSLA, a fully single-loop algorithm: `SOBA` in sequence, and STORM on the direction of x alone.

    On one upper minibatch, and a lower one each: y <- y - rho g_y(x, y), then v <- v - rho' (g_yy v - f_y) at the new
    y, then x along the estimate of f_x - g_xy v at the new y and v.

    Args:
        estimator: of the direction of x; not SAGA. Default `STORM` with eta = ``(k + 1)^{-1/2}``.
        lower_lr: as in `SOBA`.
        **kwargs: settings of `SOBA`.

    References:
        J. Li, B. Gu, H. Huang. A Fully Single Loop Algorithm for Bilevel Optimization without Hessian Inverse. AAAI
        2022.
    """

    def __init__(self, *, estimator: Estimator | None = None, **kwargs: Any) -> None:
        estimator = STORM(Power(1.0, -0.5)) if estimator is None else estimator
        super().__init__(estimator=estimator, **kwargs)
        if estimator.partitioned:
            raise BilevelError(
                f"{type(self).__name__}: its direction has samples of both levels at once, which SAGA does not "
                "remember; use STORM, SARAH or MovingAverage, or SABA as algorithm."
            )

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        v = tree.zeros_like(y)
        return {"v": v, **self.memory(joined(x=x, y=y, v=v), [joined(x=x)], ("lower",))}

    @override
    def minibatches(self, k: int) -> tuple[Draws, Draws]:
        lower, upper = super().minibatches(k)
        return lower if lower == [0] else 3, upper

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        v = self.kept("v")
        assert v is not None
        y = self.move(problem, x, y, problem.grad_g(x, y))
        product = problem.hessian_product(x, y, 1)
        d_v = tree.axpy(-1.0, problem.grad_f_y(x, y), product(v))
        v = tree.axpy(-at(self.linear_lr, self.global_step), d_v, v)

        def direction(u: Params) -> Params:
            x, y, v = (part(u, prefix) for prefix in "xyv")
            _, cross = problem.hessian_products(x, y, 2)
            return joined(x=tree.axpy(-1.0, cross(v), problem.grad_f_x(x, y)))

        d, memory = self.directions([Term(direction)], joined(x=x, y=y, v=v))
        return Step(part(d, "x"), y, {"train/residual": tree.norm(d_v)}, {"v": v, **memory})
