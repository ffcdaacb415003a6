"""Checkpoints by the clock."""

import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from typing_extensions import override

from bilevel_lightning.distributed import total_over_processes
from bilevel_lightning.errors import positive


class SaveEvery(Callback):
    """Saves a checkpoint at the first batch's end after each ``seconds``, as ``latest.ckpt`` with the run's others.

    For runs whose epochs are long: what a kill costs is then at most that time. Lightning's own
    ``ModelCheckpoint(train_time_interval=...)`` does nothing in manual optimization. The file replaces its predecessor
    as a whole (`AtomicCheckpointIO`); ``bilevel-fit --ckpt_path last`` goes on from it.

    Args:
        seconds: between two checkpoints, by the clock. Default 600.

    Raises:
        BilevelError: if ``seconds`` is not positive.
    """

    def __init__(self, seconds: float = 600.0) -> None:
        self.seconds = positive("SaveEvery.seconds", seconds)
        self._last = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.monotonic()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        due = time.monotonic() - self._last >= self.seconds
        if total_over_processes(int(due), pl_module.device):  # clocks differ, and all processes have to save
            self._last = time.monotonic()
            trainer.save_checkpoint(folder(trainer) / "latest.ckpt")


def folder(trainer: Trainer) -> Path:
    """Returns where the run's checkpoints lie."""
    chosen = trainer.checkpoint_callback
    if isinstance(chosen, ModelCheckpoint) and chosen.dirpath is not None:
        return Path(chosen.dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
