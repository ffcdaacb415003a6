"""Single-loop implicit methods: SOBA, with any estimator of its directions, and its named forms."""

from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.algorithms.estimated import Estimated, joined, part, scaled
from bilevel_lightning.estimators import SAGA, SARAH, Estimator, MovingAverage, Plain, Term
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule, at, scheduled
from bilevel_lightning.tree import Params


class SOBA(Estimated):
    r"""SOBA: y, the solution v of the linear system, and x move at once, each along an unbiased direction.

    At one point (x, y, v), on one minibatch of each level:
    d_y = g_y,  d_v = g_yy v - f_y,  d_x = f_x - g_xy v;  y <- y - rho d_y,  v <- v - rho' d_v, and x along d_x.

    Args:
        estimator: of the three directions. Default `Plain`.
        linear_lr: rho', or a schedule over the upper iterations. Default lower_lr.
        lower_lr: rho, or a schedule over the upper iterations. Default 0.2.
        upper_optimizer: as in `BilevelModule`. Default SGD with step size 0.02: y and v lag behind x, so that its step
            times the curvature of f(x, y*(x)) must be well below rho times that of g; for Adam, lower its step.
        **kwargs: settings of `SingleLoop`, but for ``dynamics`` and ``lower_steps``. In the paper the steps of y, v and
            x fall as ``(k + 1)^{-1/2}``.

    References:
        M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables stochastic and
        global variance reduction algorithms. NeurIPS 2022.
    """

    def __init__(
        self,
        *,
        estimator: Estimator = Plain(),  # noqa: B008 (a value: it has no state)
        linear_lr: float | Schedule | None = None,
        lower_lr: float | Schedule = 0.2,
        upper_optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02),
        **kwargs: Any,
    ) -> None:
        super().__init__(estimator=estimator, lower_lr=lower_lr, upper_optimizer=upper_optimizer, **kwargs)
        self.linear_lr = self.lower_lr if linear_lr is None else scheduled("linear_lr", linear_lr)

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        v = tree.zeros_like(y)
        terms = [joined(y=y, v=v, x=x), joined(v=v, x=x)]
        return {"v": v, **self.memory(joined(x=x, y=y, v=v), terms, ("lower", "upper"))}

    def terms(self, problem: BilevelProblem) -> list[Term]:
        """Returns the directions as functions of the point: the lower level's part and the upper level's."""

        def lower(u: Params) -> Params:
            g_y, product, cross = problem.gradient_and_products(part(u, "x"), part(u, "y"), part(u, "v"))
            return joined(y=g_y, v=product, x=scaled(-1.0, cross))

        def upper(u: Params) -> Params:
            f_x, f_y = problem.grad_f(part(u, "x"), part(u, "y"))
            return joined(v=scaled(-1.0, f_y), x=f_x)

        found = []
        for level, evaluate in (("lower", lower), ("upper", upper)):
            numbers, shares = problem.parts.get(level, ((0,), (1.0,)))
            found.append(Term(evaluate, numbers[0], shares[numbers[0]]))
        return found

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        v = self.kept("v")
        assert v is not None
        d, memory = self.directions(self.terms(problem), joined(x=x, y=y, v=v))
        d_v = part(d, "v")
        v = tree.axpy(-at(self.linear_lr, self.global_step), d_v, v)
        logs = {"train/residual": tree.norm(d_v)}
        return Step(part(d, "x"), self.move(problem, x, y, part(d, "y")), logs, {"v": v, **memory})


class MASOBA(SOBA):
    r"""MA-SOBA: `SOBA` whose direction of x is a moving average.

    Args:
        estimator: default `MovingAverage`, theta = 0.5.
        **kwargs: settings of `SOBA`.

    References:
        X. Chen, T. Xiao, K. Balasubramanian. Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed
        Smoothness Conditions. JMLR 2024.
    """

    def __init__(self, *, estimator: MovingAverage = MovingAverage(), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(estimator=estimator, **kwargs)


class SABA(SOBA):
    r"""SABA: `SOBA` with SAGA's estimates, for finite sums; constant steps.

    Args:
        estimator: default `SAGA`.
        **kwargs: settings of `SOBA`.

    References:
        M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables stochastic and
        global variance reduction algorithms. NeurIPS 2022.
    """

    def __init__(self, *, estimator: SAGA = SAGA(), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(estimator=estimator, **kwargs)


class SRBA(SOBA):
    r"""SRBA: `SOBA` with SARAH's estimates, for finite sums; constant steps.

    Args:
        estimator: default `SARAH`, period 100.
        **kwargs: settings of `SOBA`.

    References:
        M. Dagréou, T. Moreau, S. Vaiter, P. Ablin. A Lower Bound and a Near-Optimal Algorithm for Bilevel Empirical
        Risk Minimization. AISTATS 2024.
    """

    def __init__(self, *, estimator: SARAH = SARAH(), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(estimator=estimator, **kwargs)
