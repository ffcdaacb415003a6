"""Initialization auxiliary and pessimistic trajectory truncation."""

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.binding import start_depends_on_x
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.hypergradients.unrolled import Memory, differentiate
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params

AUXILIARY = "auxiliary/"


class IAPTTGM(BilevelModule):
    r"""IAPTT-GM: the start z of the lower level is learnt too, and its trajectory is cut where f is largest.

    1. y_0 = z, y_k = Phi_k(x, y_{k-1}) for k = 1..K: ``lower_steps`` steps of ``dynamics``.
    2. k* = argmax_{1 <= k <= K} f(x, y_k), the first where several are largest; y_0 is no candidate.
    3. (x, z) move along -d f(x, y_{k*}(x, z)), k* held fixed, and are projected on their sets.

    The lower level need not be convex. Without z, f can be minimised at a y_K that is far from argmin g only because
    the start cannot move; without the truncation, z alone can lower f at an unsolved lower level. Where
    `Bilevel.initial_lower` already gives y_0 as a function of x, that is z, and none is added. What the task reports of
    y is y_K. Logged besides: ``train/truncation``, the mean of k*.

    Args:
        auxiliary: learn z; False: y_0 is the task's y_0(x), or the y of the beginning, or the last one with
            ``warm_start``. Default True.
        truncate: choose k*; False: k* = K. Default True. With both off, this is `RHG`.
        auxiliary_lr: step size of the upper optimizer for z. Default: that for x.
        two_pass: run the K steps once without a graph to find k*, then k* steps again with one: memory of k* steps, at
            most k*/K more time, equal results. Default False: one pass, with the memory of K steps.
        memory: how the steps' derivatives are kept, as in `RHG`. Default ``graph``.
        warm_start: only without ``auxiliary``. Default False.
        **kwargs: settings of `BilevelModule`; the paper's accelerated steps for convex g are ``dynamics: Accelerated``.

    A batch of several starts of a numerical problem is one lower problem here, with one k*.

    Raises:
        BilevelError: if ``warm_start`` or ``auxiliary_lr`` contradicts ``auxiliary`` or the task.

    References:
        R. Liu, Y. Liu, S. Zeng, J. Zhang. Towards Gradient-based Bilevel Optimization with Non-convex Followers and
        Beyond. NeurIPS 2021. Deviations from the released code, whose numerical script differentiates another iterate
        than the one it chose, and reports z in place of y_K: here k* and y_K are what the paper defines.
    """

    side_by_side = True

    def __init__(
        self,
        *,
        auxiliary: bool = True,
        truncate: bool = True,
        auxiliary_lr: float | None = None,
        two_pass: bool = False,
        memory: Memory = "graph",
        warm_start: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(warm_start=warm_start, **kwargs)
        if auxiliary and warm_start:
            raise BilevelError(
                "warm_start has no meaning where y_0 is learnt: leave it out, or set auxiliary to false."
            )
        if auxiliary_lr is not None and not auxiliary:
            raise BilevelError("auxiliary_lr has no meaning without auxiliary: leave one of them out.")
        if memory not in get_args(Memory):
            raise BilevelError(f"memory must be 'graph', 'recompute' or 'mixed', got {memory!r}.")
        self.auxiliary, self.truncate, self.two_pass, self.memory = auxiliary, truncate, two_pass, memory
        self.auxiliary_lr = None if auxiliary_lr is None else positive("auxiliary_lr", auxiliary_lr)

    @override
    def added_upper(self, y: Params) -> Params:
        given = not self.auxiliary or start_depends_on_x(self.hooks)
        return {**super().added_upper(y), **({} if given else {AUXILIARY + n: t for n, t in y.items()})}

    @override
    def start_lower(self, x: Params, episode: Any) -> Params:
        return auxiliary(x) or super().start_lower(x, episode)

    @override
    def project_added(self) -> None:
        if z := auxiliary(self.upper_parameters()):
            for name, t in self.hooks.project_lower(tree.detach(tree.of(self.hooks.upper)), z).items():
                self.upper_parameters()[AUXILIARY + name].copy_(t)

    @override
    def upper_groups(self) -> Iterable[Any]:
        if self.auxiliary_lr is None:
            return super().upper_groups()
        x = self.upper_parameters()
        if not auxiliary(x):
            raise BilevelError("auxiliary_lr has no meaning where the task gives y_0(x): leave it out.")
        z = [p for name, p in x.items() if name.startswith(AUXILIARY)]
        rest = [p for name, p in x.items() if not name.startswith(AUXILIARY)]
        return [{"params": rest}, {"params": z, "lr": self.auxiliary_lr}]

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        steps, last = self.lower_steps, None
        chosen = torch.tensor(steps - 1)

        def worst(x: Params, iterates: list[Params]) -> Tensor:
            """Returns the index of the iterate where f is largest, for each episode."""
            return torch.stack([problem.upper_values(x, tree.detach(y)) for y in iterates]).argmax(0)

        def objective(x: Params, iterates: list[Params]) -> Tensor:
            nonlocal chosen
            if self.truncate and last is None:
                chosen = worst(x, iterates)
            return problem.f(x, select(iterates, chosen))

        if self.two_pass and self.truncate:
            state, iterates = self.dynamics.start(y), []
            for t in range(steps):
                state = self.dynamics.step(problem, x, state, t)
                iterates.append(state[0])
            chosen, last = worst(x, iterates), state[0]
            steps = int(chosen.max()) + 1
        z = {name for name in x if name.startswith(AUXILIARY)}
        through = bool(z) or problem.start_depends_on_x
        tracked, start = problem.tracked_by(self.memory), self.dynamics.start(y)
        gradient, state, adjoint = differentiate(tracked, self.dynamics, x, start, range(steps), through, objective)
        if z:
            total = {AUXILIARY + n: t if problem.episodes is None else t.sum(0) for n, t in adjoint.items()}
            gradient = {**gradient, **total}
        elif through:
            gradient = tree.axpy(1.0, problem.initial_vjp(x, adjoint), gradient)
        y = state[0] if last is None else last
        return Step(gradient, y, {"train/truncation": (chosen + 1).to(next(iter(y.values())))})


def auxiliary(x: Params) -> Params:
    """Returns z, detached, by the names of y; empty where none is added."""
    return {name.removeprefix(AUXILIARY): t.detach() for name, t in x.items() if name.startswith(AUXILIARY)}


def select(iterates: list[Params], index: Tensor) -> Params:
    """Returns iterate number ``index``, or for each episode side by side the one that ``index`` names for it."""
    if index.ndim == 0:
        return iterates[int(index)]
    episodes = torch.arange(len(index), device=index.device)
    return {name: torch.stack([y[name] for y in iterates])[index, episodes] for name in iterates[0]}
