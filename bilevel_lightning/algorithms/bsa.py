"""Randomised Neumann series: BSA and TTSA."""

from typing import Any

from typing_extensions import override

from bilevel_lightning.algorithms.bsgm import Count
from bilevel_lightning.algorithms.stocbio import StocBiO
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.linear_solvers import LinearSolver, Neumann
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Power, Schedule, at


class BSA(StocBiO):
    r"""Bilevel stochastic approximation: `StocBiO` with one random term for its Neumann series.

    v = (K + 1) rho prod_{j=1..p} (I - rho H_j) f_y,  p uniform in 0..K: the series in expectation. The direction's
    variance grows with K; let the upper step fall (``upper_scheduler``), in the paper as (s + 1)^{-1/2}.

    Args:
        linear_steps: K, at least 1. Default 10, as in `StocBiO`.
        **kwargs: settings of `StocBiO`; linear_lr a number, by default the first step size of ``dynamics``.

    Raises:
        BilevelError: if v is to be warm-started, which a random term cannot be, or K is 0, or linear_lr is a schedule.

    References:
        S. Ghadimi, M. Wang. Approximation Methods for Bilevel Programming. 2018.
    """

    side_by_side = False  # each episode draws a p of its own

    def __init__(self, *, linear_steps: Count | None = 10, **kwargs: Any) -> None:
        super().__init__(linear_steps=linear_steps, **kwargs)
        if isinstance(self.linear_lr, Schedule):
            raise BilevelError(
                f"{type(self).__name__} draws one term of a series of one step size: give linear_lr as a number."
            )
        if self.warm_start_linear or linear_steps == 0 or self.linear_start == "rhs":
            raise BilevelError(
                f"{type(self).__name__} draws one term of a series: leave warm_start_linear and linear_start out, and "
                "set linear_steps to at least 1."
            )

    @override
    def solver(self, steps: int, problem: BilevelProblem, warm: bool) -> LinearSolver:
        if steps == 0:  # after divergence
            return super().solver(steps, problem, warm)
        lr = self._linear_lr(problem)
        return Neumann(steps, lr=None if lr is None else at(lr, 0), randomised=True)


class TTSA(BSA):
    r"""Two-timescale stochastic approximation: `BSA` with a single lower step, whose size falls more slowly than x's.

    Lower steps fall as (s + 1)^{-2/5}; give x steps that fall as (s + 1)^{-3/5} by ``upper_scheduler``.

    Args:
        lower_steps: T. Default 1.
        decay_exponent: the lower step size falls as ``(s + 1)`` to this power; it must be negative. Default -2/5.
        **kwargs: settings of `BSA`.

    References:
        M. Hong, H.-T. Wai, Z. Wang, Z. Yang. A Two-Timescale Stochastic Algorithm Framework for Bilevel Optimization:
        Complexity Analysis and Application to Actor-Critic. SIAM Journal on Optimization, 2023.
    """

    def __init__(
        self,
        *,
        lower_steps: Count = 1,
        decay_exponent: float = -0.4,
        **kwargs: Any,
    ) -> None:
        if decay_exponent >= 0:
            raise BilevelError(f"decay_exponent must be negative, got {decay_exponent}; BSA has a constant step size.")
        super().__init__(lower_steps=lower_steps, lower_decay=Power(1.0, decay_exponent), **kwargs)
