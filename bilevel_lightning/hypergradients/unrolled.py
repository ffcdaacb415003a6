r"""Reverse-mode differentiation through the steps of the lower dynamics.

With y_0, the states s_{t+1} = Phi_t(x, s_t) and F(x) = f(x, y_T), the hypergradient is

    alpha_T = f_y,    h <- h + (d_x Phi_t)^T alpha_{t+1},    alpha_t = (d_s Phi_t)^T alpha_{t+1},    dF/dx = f_x + h,

for t = T-1 down to T-K. K = T is exact for F; K < T truncates the sum (T-RHG).
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bilevel_lightning import tree
from bilevel_lightning.dynamics import Dynamics, State
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params

Memory: TypeAlias = Literal["graph", "recompute", "mixed"]


def reverse(
    problem: BilevelProblem,
    dynamics: Dynamics,
    x: Params,
    y: Params,
    steps: int,
    *,
    truncation: int | None = None,
    memory: Memory | Literal["differences"] = "graph",
    radius: float = 0.01,
    objective: Callable[[Params, list[Params]], Tensor] | None = None,
) -> tuple[Params, Params]:
    """Runs the lower dynamics and differentiates the upper loss at their end.

    Args:
        problem: the oracles.
        dynamics: one lower step.
        x: upper variables.
        y: y_0, start of the lower level.
        steps: number T of lower steps.
        truncation: differentiate only the last K steps; None: all T, and through y_0(x) where it depends on x.
        memory: how the lower gradients are differentiated (`derivatives`). ``graph`` keeps the graph of the K steps;
            ``recompute`` keeps K states and evaluates each gradient again; ``mixed`` does so forward over reverse;
            ``differences`` does without second derivatives.
        radius: of ``differences``.
        objective: what to differentiate in place of f(x, y_T): a function of x and the last K iterates.

    Returns:
        dF/dx and y_T.
    """
    kept = steps if truncation is None else min(truncation, steps)
    through_start = kept == steps and problem.start_depends_on_x
    x, state = tree.detach(x), dynamics.start(tree.detach(y))
    for t in range(steps - kept):
        state = dynamics.step(problem, x, state, t)
    tracked = problem.tracked_by(memory, radius)
    last = range(steps - kept, steps)
    gradient, state, adjoint = differentiate(tracked, dynamics, x, state, last, through_start, objective)
    if through_start:
        gradient = tree.axpy(1.0, problem.initial_vjp(x, adjoint), gradient)
    return gradient, state[0]


def differentiate(
    problem: BilevelProblem,
    dynamics: Dynamics,
    x: Params,
    state: State,
    steps: range,
    through_start: bool = False,
    objective: Callable[[Params, list[Params]], Tensor] | None = None,
) -> tuple[Params, State, Params]:
    """Runs lower steps from ``state`` and differentiates f at their end by the problem's rule.

    Args:
        problem: the oracles.
        dynamics: one lower step.
        x: upper variables.
        state: of the dynamics, at the start.
        steps: numbers of the lower steps.
        through_start: whether the gradient in y at the start is wanted.
        objective: what to differentiate in place of f(x, y_T), from x and the iterates after each of the steps.

    Returns:
        The gradient in x, the state at the end, and with ``through_start`` the gradient in y at the start.
    """
    x, y = tree.leaf(x), tree.leaf(state[0]) if through_start else state[0]
    state = (y, *state[1:])
    iterates = []
    for t in steps:
        state = dynamics.step(problem, x, state, t, track=True)
        problem.count("hessian_products", t)
        problem.count("cross_products", t)
        if objective is not None:
            iterates.append(state[0])
    problem.count("upper_gradients")
    with torch.enable_grad():
        value = problem.f(x, state[0]) if objective is None else objective(x, iterates)
        gradient, adjoint = tree.grad(value, x, y if through_start else {})
    return gradient, tuple(map(tree.detach, state)), adjoint


def first_order(problem: BilevelProblem, dynamics: Dynamics, x: Params, y: Params, steps: int) -> tuple[Params, Params]:
    """Returns ``f_x + (d y_0 / d x)^T f_y`` at (x, y_T), the lower steps taken as d y_T / d y_0 := I, and y_T.

    It is the gradient of FOMAML (Finn, Abbeel, Levine. Model-Agnostic Meta-Learning. ICML 2017), and that of `reverse`
    where g is linear in y and its gradient does not depend on x.
    """
    x, state = tree.detach(x), dynamics.start(tree.detach(y))
    for t in range(steps):
        state = dynamics.step(problem, x, state, t)
    f_x, f_y = problem.grad_f(x, state[0])
    return tree.axpy(1.0, problem.initial_vjp(x, f_y), f_x), state[0]
