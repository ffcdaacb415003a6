"""Penalty-based bilevel gradient descent: with the value gap (V-PBGD) and with the gradient norm (G-PBGD)."""

from typing import Any, Literal, get_args

import torch
from pytorch_lightning.cli import OptimizerCallable
from typing_extensions import override

from bilevel_lightning.algorithms.penalty import Loopless, SingleLoop
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule, at, scheduled
from bilevel_lightning.tree import Params

Twin = Literal["restart", "persistent"]


class PBGD(SingleLoop):
    """The penalty and its scale, which both forms share.

    Args:
        gamma: penalty parameter, or a schedule over the upper iterations, which may start at 0.
        rescale: multiply both directions by c = min(1 / gamma, 1).
        upper_optimizer: optimizer of x. Default SGD with step size 0.1, as y's: y must be able to follow x.
        **kwargs: settings of `SingleLoop`.
    """

    def __init__(
        self,
        *,
        gamma: float | Schedule = 5.0,
        rescale: bool = True,
        upper_optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
        **kwargs: Any,
    ) -> None:
        super().__init__(upper_optimizer=upper_optimizer, **kwargs)
        self.gamma, self.rescale = scheduled("gamma", gamma), rescale

    def weights(self) -> tuple[float, float]:
        """Returns c and c gamma."""
        gamma = at(self.gamma, self.global_step)
        c = 1.0 / gamma if self.rescale and gamma > 1 else 1.0
        return c, c * gamma


class VPBGD(PBGD):
    r"""Value-gap penalty: gradient descent on f + gamma (g - v), where v(x) = min_y g(x, y).

    1. A twin w solves the lower level: ``lower_steps`` steps of ``dynamics``, from y.
    2. d_x = c (f_x(x, y) + gamma (g_x(x, y) - g_x(x, w))),  d_y = c (f_y(x, y) + gamma g_y(x, y)),
       c = min(1 / gamma, 1).
    3. x and y step at once: x by ``upper_optimizer``, y <- prox(y - lower_lr d_y).

    No second derivatives. The solution of the penalised problem is O(1 / gamma) from the bilevel one. With the twin
    from y, its T steps act as T terms of the Neumann series of `AIDNeumann`. Logged besides: ``train/gap``,
    g(x, y) - g(x, w), and ``train/gamma``.

    Args:
        gamma: penalty parameter, or a schedule over the upper iterations, which may start at 0. Default 5; the paper
            takes 10 in its numerical example, and a ramp from 0 to 0.2 in data hyper-cleaning.
        lower_lr: step size of y, or a schedule over the upper iterations. Default 0.1, the released code's.
        twin: ``restart`` (default, the paper's): the twin starts at y; ``persistent`` (the released code's): at its own
            last iterate, so that with few steps it lags, and the gap may be negative.
        rescale: c as above (default, the released code's); False: c = 1, whose step sizes must be of order 1 / gamma.
        **kwargs: settings of `BilevelModule`. Step sizes of ``dynamics`` and y must be below 2 over the largest
            curvature of g. ``upper_optimizer`` is SGD with step size 0.1 by default: y must be able to follow x, or the
            gap is that of its lag, and steps of a fixed length, as Adam's, need a small lr.

    Raises:
        BilevelError: if a setting is out of its range, y does not persist, or the gap is clearly negative.

    References:
        H. Shen, T. Chen. On Penalty-based Bilevel Gradient Descent Method. ICML 2023.
    """

    divisible = True

    def __init__(
        self,
        *,
        gamma: float | Schedule = 5.0,
        lower_lr: float | Schedule = 0.1,
        twin: Twin = "restart",
        rescale: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(gamma=gamma, lower_lr=lower_lr, rescale=rescale, **kwargs)
        if twin not in get_args(Twin):
            raise BilevelError(f"twin must be 'restart' or 'persistent', got {twin!r}.")
        self.twin = twin

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        return {"twin": y} if self.twin == "persistent" else {}

    @override
    def minibatches(self, k: int) -> tuple[int, int]:
        return self.lower_steps + 1, 1

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        c, weight = self.weights()
        kept, t = self.kept("twin"), self.lower_steps
        w = self.solve_lower(problem, x, y if kept is None else kept)
        f_x, f_y = problem.grad_f(x, y)
        value, g_x, g_y = problem.values_and_gradients(x, y, t)
        solved, v_x, _ = problem.values_and_gradients(x, w, t, lower=False)
        d_x = {n: c * f_x[n] + weight * (g_x[n] - v_x[n]) for n in x}
        d_y = {n: c * f_y[n] + weight * g_y[n] for n in y}
        logs = {"train/gap": self.check_gap(value, solved), "train/gamma": value.new_tensor(weight / c)}
        return Step(d_x, self.move(problem, x, y, d_y, weight), logs, {} if kept is None else {"twin": w})


class GPBGD(Loopless, PBGD):
    r"""Gradient-norm penalty: gradient descent on f + gamma |g_y|^2 / 2.

    d_x = c (f_x + gamma g_xy g_y),  d_y = c (f_y + gamma g_yy g_y),  c = min(1 / gamma, 1), all at (x, y); x and y step
    at once. One evaluation with a second derivative, no loop. Where g is not convex in y it can stop at points that
    are not stationary in g at all: g_yy g_y may vanish where g_y does not (docs/numerical.md).

    Args:
        gamma: penalty parameter, or a schedule over the upper iterations, which may start at 0. Default 5; the paper
            takes a ramp from 0 to 37 in data hyper-cleaning.
        lower_lr: step size of y, or a schedule over the upper iterations. Default 0.1.
        rescale: c as above (default, the released code's); False: c = 1.
        **kwargs: settings of `BilevelModule`, but for ``dynamics`` and ``lower_steps``. ``upper_optimizer`` is SGD with
            step size 0.1 by default.

    Raises:
        BilevelError: if a setting is out of its range, y does not persist, or the lower level has a projection or
            proximal map, at whose solution g_y does not vanish.

    References:
        H. Shen, T. Chen. On Penalty-based Bilevel Gradient Descent Method. ICML 2023.
    """

    def __init__(
        self,
        *,
        gamma: float | Schedule = 5.0,
        lower_lr: float | Schedule = 0.1,
        rescale: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(gamma=gamma, lower_lr=lower_lr, rescale=rescale, **kwargs)

    @override
    def minibatches(self, k: int) -> tuple[int, int]:
        return 1, 1

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        if problem.constrained:
            raise BilevelError(
                "GPBGD penalises |g_y|, which does not vanish at the solution of a lower level with a projection or "
                "proximal map: use VPBGD or MEHA."
            )
        c, weight = self.weights()
        f_x, f_y = problem.grad_f(x, y)
        g_y, s_x, s_y = problem.stationarity_gradients(x, y)
        d_x, d_y = ({n: c * a[n] + weight * b[n] for n in a} for a, b in ((f_x, s_x), (f_y, s_y)))
        gamma = next(iter(g_y.values())).new_tensor(weight / c)
        return Step(d_x, self.move(problem, x, y, d_y), {"train/gamma": gamma})
