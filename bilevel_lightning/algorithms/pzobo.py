"""Zeroth-order hypergradients."""

from typing import Any

from typing_extensions import override

from bilevel_lightning.errors import positive
from bilevel_lightning.hypergradients import zeroth_order
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


class PZOBO(BilevelModule):
    r"""Partial zeroth-order bilevel optimizer (PZOBO): no derivative of the lower level's solution.

    With Gaussian u_j and y_T(x) after T lower steps from the same y_0,
    h = f_x + mean_j <(y_T(x + mu u_j) - y_T(x)) / mu, f_y> u_j.

    Unbiased for mu -> 0, and for any mu where y_T is linear in x; the variance grows like dim(x) / Q.

    Args:
        directions: number Q of Gaussian directions. Default 10, as in the benchmark of M. Dagreou et al. (2022).
        radius: mu. Default 0.1, as there.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if directions or radius is not positive.

    References:
        D. Sow, K. Ji, Y. Liang. On the Convergence Theory for Hessian-Free Bilevel Algorithms. NeurIPS 2022.
    """

    divisible = True

    def __init__(self, *, directions: int = 10, radius: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.directions, self.radius = int(positive("directions", directions)), positive("radius", radius)

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        settings = {"directions": self.directions, "radius": self.radius}
        return Step(*zeroth_order(problem, self.dynamics, x, y, self.lower_steps, **settings))  # type: ignore[arg-type]
