r"""Forward-mode differentiation through the steps of the lower dynamics.

Along a direction u of x, with the tangents s'_0 = (d y_0 / d x) u and s'_{t+1} = d_s Phi_t s'_t + d_x Phi_t u,

    dF(x) u = f_x u + f_y y'_T.

Many directions run side by side; memory does not grow with the number of steps. All unit vectors give the gradient;
random signs u give the unbiased estimate mean_j (dF u_j) u_j.
"""

from contextlib import nullcontext

import torch
from torch.func import jvp, vmap

from bilevel_lightning import randomness, tree
from bilevel_lightning.distributed import processes
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
    x, state = tree.detach(x), dynamics.start(tree.detach(y))
    number = len(next(iter(directions.values())))
    tangents: State = tuple({n: t.new_zeros((number, *t.shape)) for n, t in part.items()} for part in state)
    if problem.start_depends_on_x:
        start: Params = vmap(lambda u: jvp(problem.initial, (x,), (u,))[1])(directions)
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
    """Returns the next state and its tangents, by differentiating the adjoint of the step, linear in its cotangents."""
    x, state = tree.leaf(x), tuple(map(tree.leaf, state))
    after = dynamics.step(problem, x, state, t, track=True)
    cotangents = tuple({n: torch.zeros_like(t, requires_grad=True) for n, t in part.items()} for part in after)
    pairs = [(o[n], c[n]) for o, c in zip(after, cotangents, strict=True) for n in o]
    adjoint = tree.vjp([o for o, _ in pairs], [c for _, c in pairs], x, *state, create_graph=True)
    moved = [(a[n], m[n]) for a, m in zip(adjoint, (directions, *tangents), strict=True) for n in a]
    outputs, rows = [a for a, _ in moved], [m for _, m in moved]
    if processes() == 1:
        pushed = tree.vjp(outputs, rows, *cotangents, batched=True)
    else:  # collectives do not run batched
        each = [tree.vjp(outputs, list(row), *cotangents, retain_graph=True) for row in zip(*rows, strict=True)]
        pushed = tuple({n: torch.stack([one[i][n] for one in each]) for n in part} for i, part in enumerate(cotangents))
    return tuple(map(tree.detach, after)), pushed


def forward(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, y: Params, steps: int, chunk: int | None = None
) -> tuple[Params, Params]:
    """Returns dF/dx, entry by entry, and y_T; ``chunk`` entries run side by side (None: all of them)."""
    sizes = [t.numel() for t in x.values()]
    total, like = sum(sizes), next(iter(x.values()))
    entries: list[torch.Tensor] = []
    random = randomness.state(x.values())
    for first in range(0, total, chunk or total):
        rows = torch.zeros(min(chunk or total, total - first), total, dtype=like.dtype, device=like.device)
        rows[:, first:].fill_diagonal_(1.0)
        parts = zip(x.items(), torch.split(rows, sizes, 1), strict=True)
        units = {n: r.view(-1, *t.shape).to(t) for (n, t), r in parts}
        with randomness.replayed(random) if first else nullcontext():
            found, y_end = slopes(problem, dynamics, x, y, steps, units)
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
