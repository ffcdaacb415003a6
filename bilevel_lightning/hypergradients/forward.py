r"""Forward-mode differentiation through the steps of the lower dynamics.

Along a direction u of x, with the tangents s'_0 = (d y_0 / d x) u and s'_{t+1} = d_s Phi_t s'_t + d_x Phi_t u,

    dF(x) u = f_x u + f_y y'_T.

Many directions run side by side; memory does not grow with the number of steps. All unit vectors give the gradient;
random signs u give the unbiased estimate mean_j (dF u_j) u_j.
"""

from typing import Any

import torch
from torch.func import jvp, vmap

from bilevel_lightning import tree
from bilevel_lightning.dynamics import Dynamics, State
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


def slopes(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, y: Params, steps: int, directions: Params
) -> tuple[torch.Tensor, Params]:
    """Runs the lower dynamics and differentiates the upper loss at their end along directions of x.

    Args:
        problem: the oracles.
        dynamics: one lower step.
        x: upper variables.
        y: y_0, start of the lower level.
        steps: number T of lower steps.
        directions: N directions, stacked in front of the shapes of x.

    Returns:
        The N directional derivatives of f(x, y_T(x)), and y_T.
    """
    problem = problem.tracked_by("functional")
    x, state = tree.detach(x), dynamics.start(tree.detach(y))
    number = len(next(iter(directions.values())))
    tangents: Any = tuple({n: t.new_zeros(number, *t.shape) for n, t in part.items()} for part in state)
    if problem.start_depends_on_x:
        start = vmap(lambda u: jvp(problem.initial, (x,), (u,))[1], randomness="same")(directions)
        tangents = (start, *tangents[1:])
    for t in range(steps):
        problem.count("hessian_products", t, number)
        problem.count("cross_products", t, number)
        state, tangents = _push(problem, dynamics, x, state, t, directions, tangents)
    f_x, f_y = problem.grad_f(x, state[0])
    total = [t.reshape(number, -1) @ f_x[n].flatten() for n, t in directions.items()]
    total += [t.reshape(number, -1) @ f_y[n].flatten() for n, t in tangents[0].items()]
    return torch.stack(total).sum(0), state[0]


def _push(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, state: State, t: int, directions: Params, tangents: State
) -> tuple[State, State]:
    """Returns the next state and its tangents."""

    def push(u: Params, tangent: State) -> Any:
        return jvp(lambda x, s: dynamics.step(problem, x, s, t, track=True), (x, state), (u, tangent))

    out_dims: Any = (None, 0)
    pushed: tuple[State, State] = vmap(push, out_dims=out_dims, randomness="same")(directions, tangents)
    return pushed


def forward(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, y: Params, steps: int, chunk: int | None = None
) -> tuple[Params, Params]:
    """Returns dF/dx, entry by entry, and y_T; ``chunk`` entries run side by side (None: all of them)."""
    sizes = [t.numel() for t in x.values()]
    total, like = sum(sizes), next(iter(x.values()))
    entries: list[torch.Tensor] = []
    for first in range(0, total, chunk or total):
        rows = torch.zeros(min(chunk or total, total - first), total, dtype=like.dtype, device=like.device)
        rows[:, first:].fill_diagonal_(1.0)
        parts = zip(x.items(), torch.split(rows, sizes, 1), strict=True)
        found, y_end = slopes(problem, dynamics, x, y, steps, {n: r.view(-1, *t.shape).to(t) for (n, t), r in parts})
        entries.append(found)
    flat = torch.split(torch.cat(entries), sizes)
    return {n: part.view_as(t).to(t) for (n, t), part in zip(x.items(), flat, strict=True)}, y_end


def random_forward(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, y: Params, steps: int, directions: int
) -> tuple[Params, Params]:
    """Returns the mean of (dF u) u over ``directions`` random sign vectors u, an unbiased dF/dx, and y_T."""
    signs = {n: torch.randint(2, (directions, *t.shape), device=t.device).to(t) * 2 - 1 for n, t in x.items()}
    signs = problem.agree(signs)
    found, y_end = slopes(problem, dynamics, x, y, steps, signs)
    return {n: torch.tensordot(found.to(u), u, 1) / directions for n, u in signs.items()}, y_end
