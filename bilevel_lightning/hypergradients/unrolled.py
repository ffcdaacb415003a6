r"""Reverse-mode differentiation through the steps of the lower dynamics.

With y_0, the states s_{t+1} = Phi_t(x, s_t) and F(x) = f(x, y_T), the hypergradient is

    alpha_T = f_y,    h <- h + (d_x Phi_t)^T alpha_{t+1},    alpha_t = (d_s Phi_t)^T alpha_{t+1},    dF/dx = f_x + h,

for t = T-1 down to T-K. K = T is exact for F; K < T truncates the sum (T-RHG).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bilevel_lightning import tree
from bilevel_lightning.dynamics import Dynamics, State
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params

Memory: TypeAlias = Literal["graph", "recompute"]


def reverse(
    problem: BilevelProblem,
    dynamics: Dynamics,
    x: Params,
    y: Params,
    steps: int,
    *,
    truncation: int | None = None,
    memory: Memory = "graph",
) -> tuple[Params, Params]:
    """Runs the lower dynamics and differentiates the upper loss at their end.

    Args:
        problem: the oracles.
        dynamics: one lower step.
        x: upper variables.
        y: y_0, start of the lower level.
        steps: number T of lower steps.
        truncation: differentiate only the last K steps; None: all T, and through y_0(x) where it depends on x.
        memory: ``graph`` keeps the graph of the K steps; ``recompute`` keeps the K states and rebuilds one step at a
            time: memory of K states and one step's graph, time of one more plain step for each (docs/benchmarks.md).

    Returns:
        dF/dx and y_T.
    """
    kept = steps if truncation is None else min(truncation, steps)
    through_start = kept == steps and problem.start_depends_on_x
    x, state = tree.detach(x), dynamics.start(tree.detach(y))
    for t in range(steps - kept):
        state = dynamics.step(problem, x, state, t)
    backward = _graph if memory == "graph" else _recompute
    gradient, y_end, adjoint = backward(problem, dynamics, x, state, range(steps - kept, steps), through_start)
    problem.counts["hessian_products"] += kept
    problem.counts["cross_products"] += kept
    if through_start:
        gradient = tree.axpy(1.0, problem.initial_vjp(x, adjoint), gradient)
    return gradient, y_end


def _graph(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, state: State, steps: range, through_start: bool
) -> tuple[Params, Params, Params]:
    x, start = tree.leaf(x), tree.leaf(state[0])
    state = (start, *state[1:])
    for t in steps:
        state = dynamics.step(problem, x, state, t, track=True)
    problem.counts["upper_gradients"] += 1
    with torch.enable_grad():
        gradient, adjoint = tree.grad(problem.f(x, state[0]), x, start if through_start else {})
    return gradient, tree.detach(state[0]), adjoint


def _recompute(
    problem: BilevelProblem, dynamics: Dynamics, x: Params, state: State, steps: range, through_start: bool
) -> tuple[Params, Params, Params]:
    states, random = [], []
    for t in steps:
        states.append(state)
        random.append(_random_state(state[0]))
        state = dynamics.step(problem, x, state, t)
    gradient, f_y = problem.grad_f(x, state[0])
    adjoint = [f_y, *map(tree.zeros_like, state[1:])]
    x = tree.leaf(x)
    for t in reversed(steps):
        inputs = tuple(map(tree.leaf, states.pop()))
        with _replayed(random.pop()):
            outputs = dynamics.step(problem, x, inputs, t, track=True)
        pairs = [(o[name], a[name]) for o, a in zip(outputs, adjoint, strict=True) for name in o]
        wanted = inputs if states or through_start else ()
        cross, *adjoint = tree.vjp([o for o, _ in pairs], [a for _, a in pairs], x, *wanted)
        gradient = tree.axpy(1.0, cross, gradient)
    return gradient, tree.detach(state[0]), adjoint[0] if adjoint else {}


def _random_state(y: Params) -> tuple[list[torch.device], list[Tensor]]:
    """The generators that dropout in a loss draws from: the CPU's, and those of y's accelerators."""
    devices = list({t.device for t in y.values() if t.device.type == "cuda"})
    return devices, [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


@contextmanager
def _replayed(random: tuple[list[torch.device], list[Tensor]]) -> Iterator[None]:
    """Replays a step with the random numbers of its first run."""
    devices, states = random
    with torch.random.fork_rng(devices):
        torch.set_rng_state(states[0])
        for device, state in zip(devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        yield
