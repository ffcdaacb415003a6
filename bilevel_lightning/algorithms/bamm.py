"""BAMM: a single loop on a lower level to which a share of the upper loss is added."""

from typing import Any

from typing_extensions import override

from bilevel_lightning.algorithms.fsla import FSLA
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.estimators import Estimator, Plain
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Power, Schedule, at
from bilevel_lightning.tree import Params


class BAMM(FSLA):
    r"""Averaged method of multipliers, sl-BAMM, for convex lower levels with many solutions.

    With psi = mu_k f + (1 - mu_k) g in the place of g, y, then the multiplier v, then x:

    y <- y - rho psi_y(x, y),  v <- v - rho' (psi_yy v - f_y),  x along f_x - psi_xy v.

    Where f is strongly convex in y, psi_yy has an inverse even if g_yy has none, and mu_k -> 0 leads y to the lower
    solution that f prefers. mu has to fall slowly beside what rho and the steps of x do, and while it is not small, x
    is biased: for a strongly convex g take ``mu = 0``. The paper's steps fall as (k + 1)^{-1/80} for v and as
    (k + 1)^{-3/80} mu_k^3 for x; here they are yours to set.

    Args:
        mu: share mu_k of the upper loss, 0 <= mu_k < 1, or a schedule over the upper iterations. Default
            ``0.9 (k + 1)^{-1/2}``; the released demos have an exponent of -1/10: .45 after a thousand iterations.
        lower_lr: as in `FSLA`.
        estimator: of the direction of x, as in `FSLA`. Default `Plain`, the paper's.
        **kwargs: settings of `FSLA`.

    Raises:
        BilevelError: if mu is not in [0, 1).

    References:
        R. Liu, Y. Liu, W. Yao, S. Zeng, J. Zhang. Averaged Method of Multipliers for Bi-Level Optimization without
        Lower-Level Strong Convexity. ICML 2023.
    """

    def __init__(
        self,
        *,
        mu: float | Schedule | None = None,
        estimator: Estimator = Plain(),  # noqa: B008 (a value: it has no state)
        **kwargs: Any,
    ) -> None:
        super().__init__(estimator=estimator, **kwargs)
        mu = Power(0.9, -0.5) if mu is None else mu
        if not 0 <= at(mu, 0) < 1:
            raise BilevelError(f"mu must be in [0, 1), got {at(mu, 0)}.")
        self.mu = mu

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        mu = at(self.mu, self.global_step)
        return super().bilevel_step(problem.blend(mu, 1 - mu) if mu else problem, x, y)
