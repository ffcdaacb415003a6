"""One y divided among processes, for methods of first derivatives: the strategy ``sharded``.

Each process keeps a part of every tensor of y and of what an algorithm keeps beside it, as torch's `DTensor`, divided
along the first dimension. Sums and products of such trees need no other process; norms and inner products come whole
(`tree`). A loss gets y whole, and its derivative comes back as a mean over processes, in parts.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.dynamics import FixedPoint, HigherDynamics
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.tree import Params

FIRST_ORDER = "BOME, BVFSM, DARTS, F2SA, MEHA, PZOBO, SAMA or VPBGD"
"""The algorithms whose ``divisible`` is true."""


class _Whole(torch.autograd.Function):
    """The whole of a divided tensor; its derivative is the mean of the processes' cotangents, divided as the tensor."""

    @staticmethod
    @override
    def forward(ctx: Any, part: Any) -> Tensor:
        ctx.mesh, ctx.placements = part.device_mesh, part.placements
        full: Tensor = part.full_tensor()
        return full

    @staticmethod
    @override
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        if torch.is_grad_enabled():
            raise BilevelError(
                f"A divided y has no second derivatives: set trainer.strategy to ddp, or take {FIRST_ORDER}."
            )
        share = DTensor.from_local(cotangent / ctx.mesh.size(), ctx.mesh, [Partial()], run_check=False)
        return share.redistribute(placements=ctx.placements)


def whole(values: Params) -> Params:
    """Returns the values with divided tensors gathered; differentiable once.

    The derivative of a divided tensor is averaged over processes: `distributed.mean_over_processes` leaves it.
    """
    return {name: _Whole.apply(t) if tree.divided(t) else t for name, t in values.items()}


def parts(values: Params, like: Params) -> Params:
    """Returns the values, equal on all processes, divided as the tensors of those names in ``like``."""
    if not any(map(tree.divided, like.values())):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    def part(t: Tensor, like: Any) -> Tensor:
        full = DTensor.from_local(t, like.device_mesh, [Replicate()], run_check=False)
        return full.redistribute(placements=like.placements)

    return {name: t if tree.divided(t) else part(t, like[name]) for name, t in values.items()}


def check(module: Any) -> None:
    """Refuses what cannot run with a divided y.

    Raises:
        BilevelError: for methods with second derivatives, y that do not persist, and dynamics that are not made of
            sums and products of trees alone, or learn settings; and with torch 2.4.
    """
    try:
        importlib.import_module("torch.distributed.tensor").DTensor  # noqa: B018 (in torch 2.4 it lies elsewhere)
    except (ImportError, AttributeError) as error:
        raise BilevelError(
            f"trainer.strategy sharded needs torch 2.5 or later, and this is {torch.__version__}: set it to ddp."
        ) from error
    name = type(module).__name__
    if not getattr(module, "divisible", False):
        raise BilevelError(
            "trainer.strategy sharded divides one y that persists among processes, for methods without second "
            f"derivatives: set it to ddp, or take {FIRST_ORDER} in place of {name}."
        )
    if not module.hooks.persistent_lower:
        raise BilevelError(
            "trainer.strategy sharded divides one y that persists among processes, and here each of them solves y for "
            "its own episodes: set it to ddp."
        )
    if module.learnable or isinstance(module.dynamics, FixedPoint | HigherDynamics):
        what = f"{type(module.dynamics).__name__} {'learns' if module.learnable else 'does'}"
        raise BilevelError(
            f"trainer.strategy sharded does not divide what {what}: set it to ddp, or dynamics to GradientDescent, its "
            "relatives or Adam without learnt settings."
        )


class Sharded(DDPStrategy):
    """Divides y, and what an algorithm keeps beside it, among the processes while a run trains.

    The y of n entries takes n / P of them on each of P processes, and so does every other tree of its kind: gradients,
    twins, momenta. While a loss is evaluated and differentiated, y is whole on each process. x, its optimizer and the
    data are as with ``ddp``, and so are results, up to rounding. Checkpoints hold whole tensors, and runs with any
    strategy and number of processes go on from them. Before and after training y is whole on each process.

    For methods without second derivatives and one y that persists; `check` refuses the rest.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._gathering = _Gather()

    @override
    def configure_ddp(self) -> None:
        module: Any = self.lightning_module
        check(module)
        for t in [*module.parameters(), *module.buffers()]:
            dist.broadcast(t.detach(), src=0)  # as DDP does
        if self._gathering not in module.trainer.callbacks:
            module.trainer.callbacks.insert(0, self._gathering)

    @override
    def on_train_start(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        module: Any = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        kept = [*module.states.buffers(), *(() if module.cold_start is None else module.cold_start.buffers())]

        def part(t: Tensor) -> Tensor:
            return distribute_tensor(t.detach(), mesh, [Shard(0) if t.ndim else Replicate()], src_data_rank=None)

        _replace(module, [*tree.of(module.hooks.lower).values(), *kept], part)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return dict(whole(super().lightning_module_state_dict()))


class _Gather(Callback):
    """Makes y whole at the end of training, before other callbacks read it."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = [t for t in [*pl_module.parameters(), *pl_module.buffers()] if tree.divided(t)]
        _replace(pl_module, held, lambda t: t.detach().full_tensor())


def _replace(module: nn.Module, held: list[Any], change: Callable[[Any], Tensor]) -> None:
    """Puts ``change(t)`` in place of each tensor t that the module or a part of it holds, tied ones once."""
    new: dict[int, Any] = {id(t): nn.Parameter(change(t)) if isinstance(t, nn.Parameter) else change(t) for t in held}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            tensors.update({name: new[id(t)] for name, t in tensors.items() if id(t) in new})


StrategyRegistry.register("sharded", Sharded, description="y divided among processes (sharding.py)", override=True)
