"""Reverse hypergradient and its truncated form."""

from typing import Any, get_args

from typing_extensions import override

from bilevel_lightning.errors import BilevelError
from bilevel_lightning.hypergradients import first_order, reverse
from bilevel_lightning.hypergradients.unrolled import Memory
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


class RHG(BilevelModule):
    r"""Reverse hypergradient (RHG), also iterative differentiation (ITD); with ``truncation`` T-RHG.

    1. y_{t+1} = Phi_t(x, y_t), t = 0..T-1: ``lower_steps`` steps of ``dynamics``.
    2. alpha_T = f_y(x, y_T); for t = T-1 down to T-K:
       h <- h + (d_x Phi_t)^T alpha_{t+1},  alpha_t = (d_y Phi_t)^T alpha_{t+1}.
    3. Hypergradient f_x(x, y_T) + h.

    With K = T it is the exact gradient of f(x, y_T(x)), and flows through y_0(x) where that depends on x (MAML); its
    distance to the gradient of f(x, y*(x)) falls like (1 - lr mu)^T for a mu-strongly convex g and gradient descent.
    K < T adds an error of order (1 - lr mu)^K.

    Args:
        truncation: number K of last lower steps to differentiate, 1 <= K <= T; None (default): all.
        memory: ``graph`` (default) keeps the graph of K steps; ``recompute`` keeps the K iterates and evaluates each
            lower gradient again: equal to rounding, less memory, about 1.5 times the time; ``mixed`` does so forward
            over reverse: still less memory, more time (docs/benchmarks.md).
        first_order: take d y_T / d y_0 := I, so that the hypergradient is f_x + (d y_0 / d x)^T f_y (FOMAML). Default
            False.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if truncation is outside 1..T, or first_order comes with a truncation, with a memory or with a
            lower level whose start does not depend on x.

    References:
        L. Franceschi, M. Donini, P. Frasconi, M. Pontil. Forward and Reverse Gradient-Based Hyperparameter
        Optimization. ICML 2017.
        A. Shaban, C.-A. Cheng, N. Hatch, B. Boots. Truncated Back-propagation for Bilevel Optimization. AISTATS 2019.
    """

    compilable = True
    side_by_side = True

    def __init__(
        self, *, truncation: int | None = None, memory: Memory = "graph", first_order: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if first_order and (truncation is not None or memory != "graph"):
            raise BilevelError("first_order differentiates no lower step: leave truncation and memory out.")
        if truncation is not None and not 1 <= truncation <= self.lower_steps:
            raise BilevelError(
                f"truncation K={truncation} must be between 1 and lower_steps T={self.lower_steps}: "
                "lower truncation or raise lower_steps."
            )
        if memory not in get_args(Memory):
            raise BilevelError(f"memory must be 'graph', 'recompute' or 'mixed', got {memory!r}.")
        if self.compiled is not None and memory != "graph":
            raise BilevelError(f"compile records the graph: use memory 'graph' with it, not {memory!r}.")
        self.truncation, self.memory, self.first_order = truncation, memory, first_order

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        if self.first_order:
            if not problem.start_depends_on_x:
                raise BilevelError("first_order needs a start y_0(x): define initial_lower; persistent_lower = False.")
            return Step(*first_order(problem, self.dynamics, x, y, self.lower_steps))
        gradient, y = reverse(
            problem, self.dynamics, x, y, self.lower_steps, truncation=self.truncation, memory=self.memory
        )
        return Step(gradient, y)


class ITD(RHG):
    r"""Iterative differentiation (ITD): the name of `RHG` beside approximate implicit differentiation (AID).

    Args:
        **kwargs: settings of `RHG`.

    References:
        R. Grazzi, L. Franceschi, M. Pontil, S. Salzo. On the Iteration Complexity of Hypergradient Computation. ICML
        2020.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class TRHG(RHG):
    r"""Truncated reverse hypergradient (T-RHG): `RHG` with K < T by default.

    Args:
        truncation: number K of last lower steps to differentiate. Default 10, half of the default T.
        **kwargs: settings of `RHG`.

    References:
        A. Shaban, C.-A. Cheng, N. Hatch, B. Boots. Truncated Back-propagation for Bilevel Optimization. AISTATS 2019.
    """

    def __init__(self, *, truncation: int = 10, **kwargs: Any) -> None:
        super().__init__(truncation=truncation, **kwargs)
