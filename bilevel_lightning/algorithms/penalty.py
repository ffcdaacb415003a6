"""What first-order methods share: they move y themselves, once in an upper iteration, beside or after x."""

from abc import ABC
from typing import Any

from torch import Tensor
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.dynamics import GradientDescent
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.module import BilevelModule
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule, at, scheduled
from bilevel_lightning.tree import Params


class SingleLoop(BilevelModule, ABC):
    """Base of the methods that step y with a step size of their own; y must persist.

    Args:
        lower_lr: step size of y, or a schedule over the upper iterations.
        **kwargs: settings of `BilevelModule`.

    Raises:
        BilevelError: if lower_lr is not positive, or the task solves y anew for each episode and does not store it, or
            stores fewer than the data have tasks.
    """

    estimates_hypergradient = False
    upper_rates, lower_rates = "upper_optimizer.lr, or lower_lr", "lower_lr, or dynamics.lr"

    def __init__(self, *, lower_lr: float | Schedule = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lower_lr = scheduled("lower_lr", lower_lr)

    @override
    def configure_model(self) -> None:
        if not self.hooks.persistent_lower and not self.hooks.stored_lowers:
            raise BilevelError(
                f"{type(self).__name__} moves y once in an upper iteration, so y must persist: set persistent_lower = "
                "True, or store those of the episodes (FewShot.stored_heads), or use F2SA, BVFSM or RHG, which solve "
                "the lower level of each episode."
            )
        super().configure_model()

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        stored: int = self.hooks.stored_lowers
        tasks = getattr(getattr(self.trainer, "datamodule", None), "train_episodes", stored)
        if stored and tasks != stored:
            raise BilevelError(
                f"{type(self).__name__} steps the y of a fixed set of tasks, each with its own data: the task stores "
                f"{stored}, and data.train_episodes is {tasks}: set both to the same number."
            )

    def move(self, problem: BilevelProblem, x: Params, y: Params, d_y: Params, share: float = 1.0) -> Params:
        """Returns ``prox(y - lr d_y)``, where d_y holds ``share`` times the lower loss."""
        lr = at(self.lower_lr, self.global_step)
        return problem.prox(x, tree.axpy(-lr, d_y, y), lr * share)

    def check_gap(self, value: Tensor, solved: Tensor) -> Tensor:
        """Returns the value gap ``value - solved``.

        Raises:
            BilevelError: if it is clearly negative: what should solve the lower level is far from solving it.
        """
        gap = value - solved
        if float(gap) < -(1.0 + abs(float(value))):
            raise BilevelError(
                f"The value gap g(x, y) - g(x, twin) is {float(gap):.3g} at upper iteration {self.global_step}, and it "
                "cannot be negative: the twin diverges, or is not solved. Lower dynamics.lr, or raise lower_steps."
            )
        return gap


class Loopless(SingleLoop, ABC):
    """Base of the single-loop methods without a lower loop: ``dynamics`` and ``lower_steps`` have no part in them.

    Raises:
        BilevelError: if one of the two is given.
    """

    lower_rates, lower_loop = "lower_lr", False

    def __init__(self, **kwargs: Any) -> None:
        for name in {"dynamics", "lower_steps"} & kwargs.keys():
            if kwargs[name] != 1:  # lower_steps = 1 says what is, and lies in the checkpoints of runs from Python
                raise BilevelError(
                    f"{name} has no part in {type(self).__name__}, which moves y by steps of lower_lr: leave {name} "
                    "out, and set lower_lr."
                )
            del kwargs[name]
        super().__init__(dynamics=GradientDescent(lr=0.1), lower_steps=1, **kwargs)
