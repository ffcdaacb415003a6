"""What reports have in common that train a task's model from scratch at the end of a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import OptimizerCallable
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from bilevel_lightning.errors import positive


class FromScratch(Callback):
    """Keeps the task's model as it was before the run.

    Attributes:
        scratch: that model; None before the run.
        progress: whether `counted` shows a bar: where the trainer does, on a terminal.
    """

    def __init__(self) -> None:
        self.scratch: nn.Module | None = None
        self.progress = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.progress = trainer.progress_bar_callback is not None and Console().is_terminal
        if stage == "fit" and self.scratch is None:
            task: Any = pl_module.hooks
            self.scratch = deepcopy(task.lower)

    def fresh(self, like: Tensor) -> nn.Module:
        """Returns a copy of that model to train, on the device and in the precision of ``like``."""
        return deepcopy(self.scratch).to(like).train()  # type: ignore[union-attr]

    def counted(self, number: int, name: str) -> Iterable[int]:
        """Returns 0, 1, ..., and shows how far a training that takes so many steps is."""
        what = f"Training on {name}"
        return track(range(number), what, console=Console(), transient=True, disable=not self.progress)

    @staticmethod
    def print_table(title: str, caption: str, columns: Sequence[str], rows: Mapping[str, Iterable[str]]) -> None:
        """Prints a table; the first column holds the names of the rows."""
        table = Table(title=title, caption=caption)
        for i, name in enumerate(columns):
            table.add_column(name, justify="right" if i else "left")
        for name, cells in rows.items():
            table.add_row(name, *cells)
        Console().print(table)

    @staticmethod
    def report(trainer: Trainer, values: dict[str, float]) -> None:
        """Gives numbers to the loggers, as ``report/...``."""
        for logger in trainer.loggers:
            logger.log_metrics({f"report/{name}": value for name, value in values.items()}, step=trainer.global_step)
            logger.save()


class Retraining(FromScratch):
    """Base of the reports that train it by an optimizer.

    Args:
        steps: optimizer steps of each training.
        optimizer: any of torch's.
        batch_size: minibatch size, drawn with replacement; None: all samples at once.

    Raises:
        BilevelError: if steps or batch_size is not positive.
    """

    def __init__(self, steps: int, optimizer: OptimizerCallable, batch_size: int | None) -> None:
        super().__init__()
        name = type(self).__name__
        self.steps, self.optimizer = int(positive(f"{name}.steps", steps)), optimizer
        self.batch_size = batch_size if batch_size is None else int(positive(f"{name}.batch_size", batch_size))

    def trained(self, name: str, samples: tuple[Tensor, ...], loss: Callable[..., Tensor]) -> nn.Module:
        """Returns a model trained from scratch, in training mode.

        Args:
            name: what the progress bar says that it is trained on.
            samples: tensors whose first dimension counts samples; the first are the inputs.
            loss: function of the model and of a minibatch of each of ``samples``.
        """
        model, number = self.fresh(samples[0]), len(samples[0])
        optimizer = self.optimizer(model.parameters())
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode(False), torch.enable_grad():
            for _ in self.counted(self.steps, name):
                batch = samples
                if self.batch_size is not None and self.batch_size < number:
                    i = torch.randint(number, (self.batch_size,), generator=generator).to(samples[0].device)
                    batch = tuple(t[i] for t in samples)
                optimizer.step(partial(_value, partial(loss, model, *batch), optimizer))
        return model


def _value(loss: Callable[[], Tensor], optimizer: Optimizer) -> float:
    """Returns the loss and leaves its gradient, as optimizers with a line search ask for it."""
    optimizer.zero_grad()
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    return float(value.detach())
