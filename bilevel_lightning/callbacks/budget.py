"""Ends training by what the oracles have cost, so that algorithms can be compared at equal cost."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.module import ORACLES


class SampleBudget(Callback):
    """Ends training after the upper iteration in which the oracles have touched that many samples, over all processes.

    A lower gradient, a Hessian product, a cross product and an upper gradient each touch the samples of their minibatch
    (``oracle/samples``); `Bilevel.prepare` does not count, such as the losses that `LossWeights` read. Set
    ``trainer.max_steps`` to -1, or high enough.

    Args:
        samples: the budget, such as 2e6 in the poisoning experiments of Grazzi, Pontil and Salzo ("Bilevel
            Optimization with a Lower-level Contraction", JMLR 2023).

    Raises:
        BilevelError: if samples is not positive, or ``upper_iterations`` is more than 1: training ends between batches.
    """

    def __init__(self, samples: float) -> None:
        self.samples = positive("SampleBudget.samples", samples)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        several = getattr(pl_module, "upper_iterations", 1)
        if several > 1:
            raise BilevelError(
                f"SampleBudget ends training after a batch, and model.upper_iterations={several} takes that many upper "
                "iterations on each: leave upper_iterations out, or end training by trainer.max_steps."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= self._spent(pl_module) >= self.samples

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._spent(pl_module) >= self.samples:
            trainer.should_stop = True
            rank_zero_info(
                f"SampleBudget: {self._spent(pl_module)} samples touched in {trainer.global_step} upper iterations."
            )

    @staticmethod
    def _spent(module: Any) -> int:
        return int(module.oracles[ORACLES.index("samples")])
