"""Fixed-point maps of the task, and their acceleration."""

from typing import Literal

import torch
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.dynamics.base import Dynamics, State
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


class FixedPoint(Dynamics):
    """``y <- Phi(x, y)``, the task's `fixed_point_map` (equilibrium models; Phi should contract in y)."""

    rest: Literal["minimum", "fixed_point"] | None = "fixed_point"

    @override
    def linear_step(self) -> float | None:
        return 1.0

    @override
    def contraction(self, problem: BilevelProblem, x: Params, y: Params, t: int = 0) -> Params:
        return problem.fixed_point(x, y, t)

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        with torch.set_grad_enabled(track):
            return (problem.fixed_point(x, state[0], t),)


class Anderson(FixedPoint):
    r"""Anderson acceleration of a map Phi, by default the task's `fixed_point_map`.

    With the last m pairs (y_i, Phi(y_i)), r_i = Phi(y_i) - y_i, and the weights w that minimise ``|sum_i w_i r_i|^2``
    subject to sum_i w_i = 1, the step is ``y <- sum_i w_i (y_i + mixing r_i)``.

    Args:
        map: dynamics without memory whose step is Phi, such as `FixedPoint` (default) or `GradientDescent`.
        history: number m of pairs. Default 5.
        mixing: in (0, 1]; 1 (default) takes the images.
        ridge: added to the weights' normal matrix, relative to its trace. Default 1e-10.

    Raises:
        BilevelError: if a setting is out of its range, or the map has memories.

    References:
        H. F. Walker, P. Ni. Anderson Acceleration for Fixed-Point Iterations. SIAM Journal on Numerical Analysis, 2011.
    """

    def __init__(
        self,
        map: Dynamics = FixedPoint(),  # noqa: B008 (a value: it has no state)
        history: int = 5,
        mixing: float = 1.0,
        ridge: float = 1e-10,
    ) -> None:
        if len(map.start({})) > 1:
            raise BilevelError(f"Anderson.map must not have memories of its own, as {type(map).__name__} has.")
        self.map, self.rest = map, map.rest
        self.history, self.ridge = int(positive("Anderson.history", history)), positive("Anderson.ridge", ridge)
        if not 0 < mixing <= 1:
            raise BilevelError(f"Anderson.mixing must be in (0, 1], got {mixing}.")
        self.mixing = mixing

    @override
    def learnable(self, steps: int, y: Params) -> Params:
        return self.map.learnable(steps, y)

    @override
    def linear_step(self) -> float | None:
        return self.map.linear_step()

    @override
    def contraction(self, problem: BilevelProblem, x: Params, y: Params, t: int = 0) -> Params:
        return self.map.contraction(problem, x, y, t)

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        y, *pairs = state
        (image,) = self.map.step(problem, x, (y,), t, track=track)
        pairs = [*pairs, y, tree.axpy(-1.0, y, image)][-2 * self.history :]
        points, residuals = pairs[::2], pairs[1::2]
        flat = torch.stack([torch.cat([r[n].reshape(-1) for n in y]) for r in residuals])
        normal = flat @ flat.T
        trace = normal.diagonal().sum()
        normal = normal / torch.where(trace > 0, trace, torch.ones_like(trace))  # at a fixed point all residuals are 0
        eye = torch.eye(len(flat), dtype=normal.dtype, device=normal.device)
        weights = torch.linalg.solve(normal + self.ridge * eye, torch.ones_like(normal[0]))
        weights = weights / weights.sum()
        moved = {
            n: sum(w * (p[n] + self.mixing * r[n]) for w, p, r in zip(weights, points, residuals, strict=True))
            for n in y
        }
        return (moved, *pairs)
