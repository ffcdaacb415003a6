"""Variance-reduced methods with a Neumann series: MRBO, SUSTAIN, VRBO."""

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from bilevel_lightning.algorithms.estimated import Estimated, joined, part
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.estimators import SARAH, STORM, Estimator, Term
from bilevel_lightning.hypergradients import implicit
from bilevel_lightning.linear_solvers import FixedPointIteration, LinearSolver, Neumann
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.task import Draws
from bilevel_lightning.tree import Params


class MRBO(Estimated):
    r"""MRBO: y and x move at once, along STORM's estimates of g_y and of the hypergradient by a Neumann series.

    d_y estimates g_y(x, y) and d_x estimates f_x - g_xy v, where v is a Neumann series by K steps v <- v - rho (g_yy v
    - f_y) from rho f_y, each on a minibatch of its own; y <- y - lower_lr d_y, and x along d_x. With eta = 1 it is
    `StocBiO` with T = 1 and ``order="simultaneous"``.

    Args:
        estimator: of both directions; not SAGA, since the series is no mean over samples. Default `STORM`.
        linear_steps: K. Default 10.
        linear_lr: rho. Default 0.1.
        lower_lr: step size of y, or a schedule over the upper iterations. Default 0.1.
        **kwargs: settings of `SingleLoop`, but for ``dynamics`` and ``lower_steps``. In the paper the steps of y and x
            fall as ``(k + 1)^{-1/3}``.

    References:
        J. Yang, K. Ji, Y. Liang. Provably Faster Algorithms for Bilevel Optimization. NeurIPS 2021.
    """

    def __init__(
        self,
        *,
        estimator: Estimator = STORM(),  # noqa: B008 (a value: it has no state)
        linear_steps: int = 10,
        linear_lr: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(estimator=estimator, **kwargs)
        if estimator.partitioned:
            raise BilevelError(
                f"{type(self).__name__}: a Neumann series is no mean over samples, so SAGA does not apply; use STORM "
                "or SARAH, or SABA as algorithm."
            )
        self.linear_steps = int(positive("linear_steps", linear_steps))
        self.linear_solver = self.solver(self.linear_steps, positive("linear_lr", linear_lr))

    def solver(self, steps: int, lr: float) -> LinearSolver:
        """Returns what gives v by ``steps`` products."""
        return FixedPointIteration(steps + 1, tol=0.0, lr=lr)

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        return self.memory(joined(x=x, y=y), [joined(x=x, y=y)], ("lower",))

    @override
    def minibatches(self, k: int) -> tuple[Draws, Draws]:
        lower, upper = super().minibatches(k)
        return lower if lower == [0] else self.linear_steps + 2, upper

    def term(self, problem: BilevelProblem) -> Term:
        """Returns both directions as a function of the point."""

        def directions(u: Params) -> Params:
            x, y = part(u, "x"), part(u, "y")
            d_x, _ = implicit(problem, self.dynamics, x, y, self.linear_solver, t=1, cross=self.linear_steps)
            return joined(y=problem.grad_g(x, y), x=d_x)

        return Term(directions)

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        d, memory = self.directions([self.term(problem)], joined(x=x, y=y))
        return Step(part(d, "x"), self.move(problem, x, y, part(d, "y")), state=memory)


class SUSTAIN(MRBO):
    r"""SUSTAIN: `MRBO` with one random term for the Neumann series.

    Args:
        linear_steps: K; the term has p factors, p uniform in 0..K and the same at both points. Default 10.
        **kwargs: settings of `MRBO`.

    References:
        P. Khanduri, S. Zeng, M. Hong, H.-T. Wai, Z. Wang, Z. Yang. A Near-Optimal Algorithm for Stochastic Bilevel
        Optimization via Double-Momentum. NeurIPS 2021.
    """

    def __init__(self, *, linear_steps: int = 10, **kwargs: Any) -> None:
        super().__init__(linear_steps=linear_steps, **kwargs)

    @override
    def solver(self, steps: int, lr: float) -> LinearSolver:
        return Neumann(steps, lr=lr, randomised=True)


class VRBO(MRBO):
    r"""VRBO: `MRBO` with SARAH's estimates, corrected in every one of T lower steps between two steps of x.

    After x has moved, T times: both directions are corrected on fresh minibatches, y <- y - lower_lr d_y. Then x moves
    along d_x, every ``period`` iterations that over all samples.

    Args:
        estimator: default `SARAH`, period 10.
        lower_steps: T. Default 3.
        **kwargs: settings of `MRBO`.

    References:
        J. Yang, K. Ji, Y. Liang. Provably Faster Algorithms for Bilevel Optimization. NeurIPS 2021.
    """

    lower_loop = True

    def __init__(self, *, estimator: SARAH = SARAH(10), lower_steps: int = 3, **kwargs: Any) -> None:  # noqa: B008
        super().__init__(estimator=estimator, **kwargs)
        self.lower_steps = int(positive("lower_steps", lower_steps))

    @override
    def minibatches(self, k: int) -> tuple[Draws, Draws]:
        steps = self.lower_steps if k else 0
        whole = [0] * self.estimator.restarts(k)
        return whole + [1] * (steps * (self.linear_steps + 2)), whole + [1] * steps

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        k, memory, number = self.batches, self.remembered(), self.linear_steps + 2
        restart = self.estimator.restarts(k)
        direction: Params = memory["direction"]
        for t in range(self.lower_steps if k else 0):
            first = restart + t * number
            view = problem.only(range(first, first + number), [restart + t])
            direction, memory = self._estimate(view, x, y, memory, False)
            y = self.move(problem, x, y, part(direction, "y"))
        if restart:
            direction, memory = self._estimate(problem.only([0], [0]), x, y, memory, True)
        return Step(part(direction, "x"), y, state=memory)

    def _estimate(
        self, problem: BilevelProblem, x: Params, y: Params, memory: Mapping[str, Params], restart: bool
    ) -> tuple[Params, dict[str, Params]]:
        found, after = self.estimator.estimate([self.term(problem)], joined(x=x, y=y), memory, self.batches, restart)
        return found, after  # type: ignore[return-value]  # no rows here
