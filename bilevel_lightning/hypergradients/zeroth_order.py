r"""Hypergradients from evaluations of the lower level at shifted x, without any derivative of it.

With Gaussian directions u_j and y_T(x) from one y_0, the Jacobian of y_T is estimated by its differences:

    h = f_x + mean_j <(y_T(x + mu u_j) - y_T(x)) / mu, f_y> u_j.
"""

import torch
from torch.func import vmap

from bilevel_lightning import tree
from bilevel_lightning.dynamics import Dynamics
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


def zeroth_order(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, y: Params, steps: int, *, directions: int, radius: float
) -> tuple[Params, Params]:
    """Runs the lower dynamics at x and at ``directions`` shifted x, side by side, with the same random numbers.

    Args:
        problem: the oracles.
        dynamics: one lower step.
        x: upper variables.
        y: y_0, start of the lower level.
        steps: number T of lower steps.
        directions: number Q of Gaussian directions.
        radius: length mu of the shifts.

    Returns:
        h and y_T(x).
    """
    problem = problem.tracked_by("functional")
    u = problem.agree({n: torch.randn(directions, *t.shape, dtype=t.dtype, device=t.device) for n, t in x.items()})
    shifts = {n: torch.cat([torch.zeros_like(t[:1]), radius * t]) for n, t in u.items()}

    def solve(shift: Params) -> Params:
        shifted = tree.axpy(1.0, shift, x)
        start = problem.initial(shifted) if problem.start_depends_on_x else y
        state = dynamics.start(start)
        for t in range(steps):
            state = dynamics.step(problem, shifted, state, t, track=True)
            problem.count("lower_gradients", t, directions)
        return state[0]

    with torch.no_grad():
        ends = vmap(solve, randomness="same")(shifts)
    y_end = {n: t[0] for n, t in ends.items()}
    f_x, f_y = problem.grad_f(x, y_end)
    changes = [(t[1:] - t[0]).reshape(directions, -1) @ f_y[n].flatten() for n, t in ends.items()]
    slopes = torch.stack(changes).sum(0) / radius
    return {n: f_x[n] + torch.tensordot(slopes.to(t), t, 1) / directions for n, t in u.items()}, y_end
