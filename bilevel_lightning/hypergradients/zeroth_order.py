r"""Hypergradients from evaluations of the lower level at shifted x, without any derivative of its solution.

With Gaussian directions u_j and y_T(x) from one y_0 (or from y_0(x)), the Jacobian of y_T is estimated by differences:

    h = f_x + mean_j <(y_T(x + mu u_j) - y_T(x)) / mu, f_y> u_j.
"""

import torch

from bilevel_lightning import randomness, tree
from bilevel_lightning.dynamics import Dynamics
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


def zeroth_order(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, y: Params, steps: int, *, directions: int, radius: float
) -> tuple[Params, Params]:
    """Runs the lower dynamics at x and at ``directions`` shifted x, with the same random numbers.

    Args:
        problem: the oracles.
        dynamics: one lower step.
        x: upper variables.
        y: y_0, start of the lower level where it does not depend on x.
        steps: number T of lower steps.
        directions: number Q of Gaussian directions.
        radius: length mu of the shifts.

    Returns:
        h and y_T(x).
    """
    x, y = tree.detach(x), tree.detach(y)

    def solve(x: Params) -> Params:
        state = dynamics.start(problem.initial(x) if problem.start_depends_on_x else y)
        for t in range(steps):
            state = dynamics.step(problem, x, state, t)
        return state[0]

    random = randomness.state(x.values())
    with torch.no_grad():
        y_end = solve(x)
    gradient, f_y = problem.grad_f(x, y_end)
    for _ in range(directions):
        u = problem.agree({n: torch.randn_like(t) for n, t in x.items()})
        with randomness.replayed(random), torch.no_grad():
            moved = solve(tree.axpy(radius, u, x))
        slope = tree.dot(tree.axpy(-1.0, y_end, moved), f_y) / (radius * directions)
        gradient = {n: t + slope.to(t) * u[n] for n, t in gradient.items()}
    return gradient, y_end
