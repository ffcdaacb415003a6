"""A run that goes on from a checkpoint with other settings of the optimizer."""

import warnings
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

OPTIMIZERS, SCHEDULERS = ("upper_optimizer", "optimizer"), ("upper_scheduler", "scheduler")


class GivenSettings(Callback):
    """Lets settings that differ from a checkpoint's count where the run goes on.

    The states of the optimizer, of its step-size schedule and of early stopping hold the settings of before, and would
    silently bring them back. Step sizes become those that the settings at hand have at this iteration. What the
    optimizer remembers stays, unless it is of another class or has other switches, such as a momentum where there was
    none; then it begins anew.
    """

    def __init__(self) -> None:
        self.changed: list[str] = []
        self.same_class = True
        self.before: dict[str, Any] = {}  # settings of the checkpoint's optimizer

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        before, now = checkpoint.get("hyper_parameters", {}), pl_module.hparams
        self.changed = [name for name in OPTIMIZERS + SCHEDULERS if before.get(name) != now.get(name)]
        self.same_class = all(_class(before.get(name)) == _class(now.get(name)) for name in OPTIMIZERS)
        self.before = dict(checkpoint["optimizer_states"][0]["param_groups"][0])  # loading adds to it
        if self.changed:
            checkpoint["lr_schedulers"] = []  # made anew below
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.state_key in checkpoint["callbacks"]:
                checkpoint["callbacks"][callback.state_key]["patience"] = callback.patience

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.changed:
            return
        state = dict(trainer.optimizers[0].state)
        trainer.strategy.setup_optimizers(trainer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for config in trainer.lr_scheduler_configs:
                for _ in range(trainer.global_step):
                    config.scheduler.step()  # type: ignore[call-arg]
        (optimizer,) = trainer.optimizers
        settings = {name: value for name, value in optimizer.defaults.items() if name != "lr"}  # which may end at 0
        switched = any(bool(value) != bool(self.before.get(name)) for name, value in settings.items())
        anew = switched or not self.same_class
        if not anew:
            optimizer.state.update(state)
        rank_zero_info(
            f"Changed since the checkpoint was written, and as given now from here on: {', '.join(self.changed)}."
            f"{' The optimizer begins anew.' if anew else ''}"
        )


def _class(setting: Any) -> Any:
    return setting.get("class_path") if isinstance(setting, dict) else setting
