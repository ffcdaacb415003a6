"""Optimizers of torch as lower dynamics, made differentiable by the library `higher`."""

import warnings
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.dynamics.base import Dynamics, State
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params


class HigherDynamics(Dynamics):
    r"""One step of any optimizer of `torch.optim` that `higher` can differentiate: SGD, Adam, Adagrad, RMSprop, ...

    Use the dynamics of this package where they exist: they are faster, take schedules and learnt settings, and know
    the task's proximal map, which is applied here after the step with the optimizer's ``lr``. `higher` supports
    neither AdamW nor learnt betas (its derivative in Adam's b2 is wrong), and its Adam adds eps before the bias
    correction: it differs from torch's where eps is not tiny, and has no derivative in forward mode (`ForwardHG`,
    `FG2U`) where a gradient is exactly zero.

    Args:
        optimizer: makes the optimizer from parameters. Default SGD with step size 0.1.

    Raises:
        BilevelError: if `higher` does not support the optimizer.

    References:
        E. Grefenstette et al. Generalized Inner Loop Meta-Learning. 2019 (the library `higher`).
    """

    def __init__(self, optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1)) -> None:
        self.optimizer = optimizer
        self._make([torch.zeros(1, requires_grad=True)])

    def _make(self, parameters: list[Tensor]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what newer versions of torch deprecate, and of its RMSprop
            import higher

            optimizer = self.optimizer(parameters)
            try:
                return higher.get_diff_optim(optimizer, parameters)
            except ValueError as error:
                raise BilevelError(f"HigherDynamics.optimizer: {error} Choose SGD, Adam or RMSprop.") from error

    @override
    def start(self, y: Params) -> State:
        return (y, {})

    @override
    def step(self, problem: BilevelProblem, x: Params, state: State, t: int, *, track: bool = False) -> State:
        y, memory = state
        gradient = [*problem.grad_g(x, y, t, track=track).values()]
        optimizer = self._make([p.detach().requires_grad_() for p in y.values()])
        states: dict[int, dict[str, Any]] = optimizer.state[0]
        for key, value in memory.items():
            kind, index, name = key.split("/")
            states[int(index)][name] = value if kind == "tensor" else int(value)
        nothing = torch.zeros((), requires_grad=True)  # `higher` wants a loss; its gradient is replaced by ours
        moved = optimizer.step(nothing, params=list(y.values()), grad_callback=lambda _: gradient)
        new = {
            f"{'tensor' if isinstance(value, Tensor) else 'number'}/{index}/{name}": value
            if isinstance(value, Tensor)
            else torch.tensor(float(value))
            for index, values in states.items()
            for name, value in values.items()
            if value is not None
        }
        return problem.prox(x, dict(zip(y, moved, strict=True)), optimizer.param_groups[0]["lr"]), new
