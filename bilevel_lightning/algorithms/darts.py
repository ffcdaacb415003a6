"""One lower step, differentiated by central differences: DARTS, and SAMA."""

from typing import Any, Literal

from typing_extensions import override

from bilevel_lightning.dynamics import Adam, Dynamics
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.hypergradients import differentiate
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


class DARTS(BilevelModule):
    r"""DARTS: one differentiated lower step, without second derivatives; or of first order, plain alternation.

    1. y' = y - lr g_y(x, y), the last of ``lower_steps`` lower steps.
    2. y+- = y +- eps f_y(x, y'),  eps = radius / |f_y(x, y')|.
    3. Hypergradient f_x(x, y') - lr (g_x(x, y+) - g_x(x, y-)) / (2 eps).

    That is `TRHG` with K = 1 and its product with g_xy by central differences, for any dynamics; it is biased as that
    one is: near a solved lower level it takes lr I for the inverse of g_yy. The released code moves y by a second
    optimizer after x; here y' is the new y, and with a warm start a schedule of the dynamics counts lower steps through
    the run.

    With ``order`` 1 the direction is f_x(x, y') alone, y' being taken as independent of x: plain alternation. It is the
    paper's first-order approximation, whose steps y, x, y, x, ... are the same but for which comes first.

    Args:
        order: 2 (default) as above, or 1.
        radius: length of the difference. Default 0.01, the paper's.
        lower_steps: number of lower steps. Default 1, the paper's.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if radius is not positive, or order is not 1 or 2.

    References:
        H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable Architecture Search. ICLR 2019.
    """

    divisible = True

    def __init__(self, *, order: Literal[1, 2] = 2, radius: float = 0.01, lower_steps: int = 1, **kwargs: Any) -> None:
        super().__init__(lower_steps=lower_steps, **kwargs)
        if order not in (1, 2):
            raise BilevelError(f"order must be 1 or 2, got {order}.")
        self.order, self.radius = order, positive("radius", radius)

    @override
    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        memories = self.dynamics.start(y)[1:] if self.warm_start and self.hooks.persistent_lower else ()
        return {f"memory{i}": memory for i, memory in enumerate(memories)}

    @override
    def first_lower_step(self, k: int) -> int:
        return k * self.lower_steps if self.warm_start and self.hooks.persistent_lower else 0

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        state, first = self.dynamics.start(y), self.first_lower_step(self.batches)
        kept = [memory for i in range(len(state) - 1) if (memory := self.kept(f"memory{i}")) is not None]
        if kept:  # with a warm start the dynamics go on where they were
            state = (y, *kept)
        last = first + self.lower_steps - 1
        for t in range(first, last if self.order == 2 else last + 1):
            state = self.dynamics.step(problem, x, state, t)
        if self.order == 1:
            gradient = problem.grad_f_x(x, state[0])
        else:
            tracked = problem.tracked_by("differences", self.radius)
            gradient, state, _ = differentiate(tracked, self.dynamics, x, state, range(last, last + 1))
        memories = {f"memory{i}": memory for i, memory in enumerate(state[1:])} if kept else {}
        return Step(gradient, state[0], state=memories)


class SAMA(DARTS):
    r"""SAMA: `DARTS` with the adaptation term of the lower optimizer, here Adam, whose memories are kept.

    1. y' = y - u(g_y(x, y)), u the step of Adam.
    2. v = (du/dg) f_y(x, y'), elementwise: the Jacobian of the lower level is taken as the identity times this.
    3. Hypergradient f_x(x, y') - (g_x(x, y + eps v) - g_x(x, y - eps v)) / (2 eps),  eps = radius / |v|.

    Here du/dg is exact, with the derivative of Adam's second moment. Processes average x's gradient once.

    Args:
        dynamics: the lower optimizer. Default Adam with step size 0.01.
        **kwargs: settings of `DARTS`.

    References:
        S. K. Choe, S. V. Mehta, H. Ahn, W. Neiswanger, P. Xie, E. Strubell, E. Xing. Making Scalable Meta Learning
        Practical. NeurIPS 2023.
    """

    def __init__(self, *, dynamics: Dynamics = Adam(lr=0.01), **kwargs: Any) -> None:  # noqa: B008 (it has no state)
        super().__init__(dynamics=dynamics, **kwargs)
