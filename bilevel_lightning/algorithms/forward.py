"""Forward-mode hypergradients: every entry of x, or random directions."""

from typing import Any

from typing_extensions import override

from bilevel_lightning.errors import positive
from bilevel_lightning.hypergradients import forward, random_forward
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


class ForwardHG(BilevelModule):
    r"""Forward-mode hypergradient (Forward-HG), for few upper variables.

    Z_0 = d y_0 / d x,  Z_{t+1} = (d_y Phi_t) Z_t + d_x Phi_t,  hypergradient f_x + Z_T^T f_y.

    Equal to `RHG`. Memory is that of one lower step and of Z, dim(y) x dim(x), for any number of steps; time grows with
    dim(x).

    Args:
        chunk: number of columns of Z that run side by side; smaller takes less memory and runs the lower level more
            often. Default None: all.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if chunk is not positive.

    References:
        L. Franceschi, M. Donini, P. Frasconi, M. Pontil. Forward and Reverse Gradient-Based Hyperparameter
        Optimization. ICML 2017.
    """

    def __init__(self, *, chunk: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chunk = chunk if chunk is None else int(positive("chunk", chunk))

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        return Step(*forward(problem, self.dynamics, x, y, self.lower_steps, self.chunk))


class FG2U(BilevelModule):
    r"""Forward gradient unrolling (FG2U): unbiased, with memory that depends neither on T nor on dim(x).

    With random signs u_j,  h = mean_j (dF/dx u_j) u_j,  each dF/dx u_j in forward mode through all lower steps. The
    variance is (dim(x) - 1) / N of the squared norm of the hypergradient.

    Args:
        directions: number N of random directions. Default 8.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if directions is not positive.

    References:
        Q. Shen, Y. Wang, Z. Yang, X. Li, H. Wang, Y. Zhang, J. Scarlett, Z. Zhu, K. Kawaguchi. Memory-Efficient
        Gradient Unrolling for Large-Scale Bi-level Optimization. NeurIPS 2024.
    """

    def __init__(self, *, directions: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.directions = int(positive("directions", directions))

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        return Step(*random_forward(problem, self.dynamics, x, y, self.lower_steps, self.directions))
