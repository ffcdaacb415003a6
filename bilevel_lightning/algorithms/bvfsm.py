"""Bilevel value-function sequential minimisation."""

from typing import Any, Literal, get_args

from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule, at, scheduled
from bilevel_lightning.tree import Params

Penalty = Literal["quadratic", "log"]


class BVFSM(BilevelModule):
    r"""Penalises the regularised value function, two lower levels solved in turn (BVFSM, BVFIM).

    1. z: ``lower_steps`` steps of ``dynamics`` on g + mu |z|^2 / 2;  v = g(x, z) + mu |z|^2 / 2 + mu.
    2. y: as many steps on (f + theta |y|^2 / 2 + P(g - v)) / (1 + w), the weight w = P'(g(x, y) - v) anew at each.
    3. d_x = (f_x(x, y) + w (g_x(x, y) - g_x(x, z))) / (1 + w).

    ``quadratic``: P(s) = max(s, 0)^2 / (2 tau); ``log``: P(s) = -tau log(-s), and w is infinite where s >= 0, outside
    its domain. Dividing by 1 + w, which the papers do not do, lets step sizes stay as w grows. First derivatives only;
    the lower level may have many solutions, among which f then decides. As mu, theta and tau fall the problem tends to
    the bilevel one, and w grows. Logged besides: ``train/gap``, g(x, y) - v, and ``train/share``, w / (1 + w).

    Args:
        mu: regularisation of z and slack of v, or a schedule over the upper iterations, such as ``Power(0.01, -0.5)``;
            the papers let all three fall. Default 1e-3.
        theta: regularisation of y, likewise. Default 1e-3.
        tau: of the penalty, likewise; of the size of the gap that is tolerated. Default 1e-4.
        penalty: P as above. Default ``quadratic``.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if a setting is out of its range.

    References:
        R. Liu, X. Liu, X. Yuan, S. Zeng, J. Zhang. A Value-Function-based Interior-point Method for Non-convex Bi-level
        Optimization. ICML 2021.
        R. Liu, X. Liu, S. Zeng, J. Zhang, Y. Zhang. Value-Function-based Sequential Minimization for Bi-level
        Optimization. TPAMI 2023.
    """

    divisible = True
    estimates_hypergradient = False

    def __init__(
        self,
        *,
        mu: float | Schedule = 1e-3,
        theta: float | Schedule = 1e-3,
        tau: float | Schedule = 1e-4,
        penalty: Penalty = "quadratic",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if penalty not in get_args(Penalty):
            raise BilevelError(f"penalty must be 'quadratic' or 'log', got {penalty!r}.")
        self.mu, self.theta = scheduled("mu", mu), scheduled("theta", theta)
        self.tau, self.penalty = scheduled("tau", tau), penalty

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        return {"z": y} if self.warm_start else {}

    @override
    def minibatches(self, k: int) -> tuple[int, int]:
        return self.lower_steps + 1, 1

    def share(self, gap: float, tau: float) -> float:
        """Returns w / (1 + w) with w = P'(gap)."""
        if self.penalty == "quadratic":
            return max(gap, 0.0) / (tau + max(gap, 0.0))
        return tau / (tau - gap) if gap < 0 else 1.0

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        mu, theta, tau = (at(value, self.global_step) for value in (self.mu, self.theta, self.tau))
        kept, t = self.kept("z"), self.lower_steps
        z = self.solve_lower(problem.blend(0.0, weight=mu), x, y if kept is None else kept)
        solved, v_x, _ = problem.values_and_gradients(x, z, t, lower=False)
        v = float(solved) + mu * float(tree.dot(z, z)) / 2 + mu
        state = self.dynamics.start(y)
        for i in range(self.lower_steps):
            share = self.share(float(problem.value(x, state[0], i)) - v, tau)
            state = self.dynamics.step(problem.blend(1 - share, share, weight=(1 - share) * theta), x, state, i)
        y = state[0]
        value, g_x, _ = problem.values_and_gradients(x, y, t, lower=False)
        f_x, share = problem.grad_f_x(x, y), self.share(float(value) - v, tau)
        d_x = {n: (1 - share) * f_x[n] + share * (g_x[n] - v_x[n]) for n in x}
        logs = {"train/gap": value - v, "train/share": value.new_tensor(share)}
        return Step(d_x, y, logs, {} if kept is None else {"z": z})
