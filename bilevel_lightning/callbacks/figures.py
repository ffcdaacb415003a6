"""Where figures and other files of a run go, and when something is noted for them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from typing_extensions import override


class Figures(Callback, ABC):
    """Base of callbacks that draw: into TensorBoard after each validation and, at the end, PNGs in the run's folder."""

    @abstractmethod
    def figures(self, trainer: Trainer, pl_module: Any) -> dict[str, Figure]:
        """Returns the figures by their names; none where there is nothing to draw."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            show(trainer, lambda: self.figures(trainer, pl_module), files=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        show(trainer, lambda: self.figures(trainer, pl_module), board=False)


def show(trainer: Trainer, draw: Callable[[], dict[str, Figure]], board: bool = True, files: bool = True) -> None:
    """Puts figures into TensorBoard, and as PNGs into the run's folder; draws them only if one of both is there."""
    folder = run_folder(trainer) if files else None
    boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)] if board else []
    if trainer.is_global_zero and (folder is not None or boards):
        for name, figure in draw().items():
            for writer in boards:
                writer.add_figure(name, figure, trainer.global_step)
            if folder is not None:
                figure.savefig(folder / f"{name}.png", dpi=120)


def run_folder(trainer: Trainer) -> Path | None:
    """Returns the run's folder, made if need be; None in processes but the first, and where nothing is logged.

    `trainer.log_dir` is then ``default_root_dir``, in Python the working folder, which is not for us to write into.
    """
    name = trainer.log_dir  # all processes take part in agreeing on it
    if name is None or not trainer.loggers or not trainer.is_global_zero:
        return None
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def due(trainer: Trainer) -> bool:
    """Whether the batch that ends is a logged one."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and trainer.fit_loop.epoch_loop.batch_progress.total.ready % every == 0


def data_with(trainer: Trainer, name: str) -> Any:
    """Returns the data module if it has that attribute, else None: of other data nothing can be shown."""
    data = getattr(trainer, "datamodule", None)
    return data if hasattr(data, name) else None
