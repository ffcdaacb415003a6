r"""Implicit differentiation at a solved lower level.

Where y minimises g,     dF/dx = f_x - g_xy v,          g_yy v = f_y.
Where y = Phi(x, y),     dF/dx = f_x + Phi_x^T v,       (I - Phi_y^T) v = f_y.

The second form serves equilibrium models, and lower levels with a projection or proximal map, whose Phi is one step of
the dynamics; its matrix is not symmetric. Memory does not depend on how y was found.
"""

import warnings

from bilevel_lightning import tree
from bilevel_lightning.dynamics import Dynamics
from bilevel_lightning.errors import Diverged
from bilevel_lightning.linear_solvers import LinearSolver, Solution, System
from bilevel_lightning.problem import BilevelProblem, Operator
from bilevel_lightning.tree import Params

REMEDIES = {
    "zero": "f_y is zero at y, so the implicit part of the hypergradient is zero: let the upper loss depend on y, or "
    "start the lower level at another y, where f_y is not zero.",
    "singular": "g_yy is singular at y, and the hypergradient is not defined: give the linear solver damping, add a "
    "regulariser to the lower loss, or use RHG.",
    "indefinite": "g_yy has a negative eigenvalue at y, which is no minimum of g: raise lower_steps, give the linear "
    "solver damping, or use RHG.",
    "diverged": "the residual is larger than that of v = 0: lower the linear solver's lr, or give it damping or steps.",
}


class LinearSystemWarning(UserWarning):
    """The linear system of implicit differentiation has no solution to trust; the message says why and what to do."""


def implicit(
    problem: BilevelProblem,
    dynamics: Dynamics,
    x: Params,
    y: Params,
    solver: LinearSolver,
    *,
    start: Params | None = None,
    t: int = 0,
    cross: int | None = None,
    before: bool = False,
) -> tuple[Params, Solution]:
    """Differentiates the upper loss at y as if y were the solution of the lower level.

    Args:
        problem: the oracles.
        dynamics: what moved y; its resting point is the solution.
        x: upper variables.
        y: a solution of the lower level, or near one.
        solver: of the linear system.
        start: first v; default zero.
        t: number of the first lower minibatch to use; product j takes number t + j, up to t + ``cross``.
        cross: of the cross product the same. Default ``solver.samples``.
        before: take the cross product with ``start``, as methods do that move x and v at once.

    Returns:
        dF/dx and the solution of the linear system.

    Raises:
        Diverged: if the solution is not finite.

    Warns:
        LinearSystemWarning: if the system is singular, indefinite or diverging, or f_y is zero.
    """
    x, y = tree.detach(x), tree.detach(y)
    last = solver.samples if cross is None else cross
    f_x, f_y = problem.grad_f(x, y)
    stationary = dynamics.rest == "minimum" and not problem.constrained
    known: dict[int, tuple[Operator, Operator | None, Operator | None]] = {}

    def products(j: int) -> tuple[Operator, Operator | None, Operator | None]:
        """The products on the minibatch of index j; with one minibatch they are made once.

        Of a loss the cross product is made on the last one only.
        """
        key = (t + j) % problem.minibatches
        if key not in known:
            known.clear()
            if stationary and key == (t + last) % problem.minibatches:
                known[key] = (*problem.hessian_products(x, y, key), None)
            elif stationary:
                known[key] = (problem.hessian_product(x, y, key), None, None)
            else:
                known[key] = problem.map_products(lambda p, x, y: dynamics.contraction(p, x, y, key), x, y, key)
        return known[key]

    def product(v: Params, j: int) -> Params:
        image = products(min(j, last))[0](v)
        return image if stationary else tree.axpy(-1.0, image, v)

    def transpose(w: Params) -> Params:
        image = products(0)[2]
        assert image is not None
        return tree.axpy(-1.0, image(w), w)

    system = System(product, f_y, None if stationary else transpose, dynamics.linear_step() if stationary else 1.0)
    sampled = solver.samples > 0 and problem.minibatches > 1
    solution = solver.solve(system._replace(agree=problem.agree, sampled=sampled), start)
    if solution.status == "not finite":
        raise Diverged(
            f"{type(solver).__name__} gave a v that is not finite: the lower level or the linear system has diverged. "
            "Lower dynamics.lr or the linear solver's lr."
        )
    if solution.status in REMEDIES:
        # Without numbers, so that Python shows it once in a run; train/residual is logged.
        warnings.warn(f"{type(solver).__name__}: {REMEDIES[solution.status]}", LinearSystemWarning, stacklevel=2)
    cross_product = products(last)[1]
    assert cross_product is not None
    through = cross_product(start if before and start is not None else solution.v)
    return tree.axpy(-1.0 if stationary else 1.0, through, f_x), solution
