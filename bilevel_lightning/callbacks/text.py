"""How the weights of sources of text move."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.models.weights import SourceWeights


class SourceWeightCurve(Callback):
    """The weight of each source over the upper iterations, where the weights are `SourceWeights`.

    As scalars ``train/source_weight/<name>`` with everything else that is logged; as a figure in TensorBoard after each
    validation, and as ``source_weights.png`` at the end. The names are the data module's ``names``, else numbers.

    Attributes:
        path: upper iterations and the weights there, at the beginning and wherever scalars are logged.
    """

    def __init__(self) -> None:
        self.path: list[tuple[int, list[float]]] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"path": self.path}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.path = [(step, [*weights]) for step, weights in state_dict["path"]]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (weights := _weights(pl_module)) is not None and not self.path:
            self.path.append((trainer.global_step, weights.tolist()))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        weights = _weights(pl_module)
        if weights is None:
            return
        for name, weight in zip(_names(trainer, len(weights)), weights, strict=True):
            pl_module.log(f"train/source_weight/{name}", weight, batch_size=1)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and trainer.global_step > self.path[-1][0]:
            self.path.append((trainer.global_step, weights.tolist()))

    def figure(self, trainer: Trainer) -> Figure:
        """Draws the path."""
        figure = Figure(figsize=(5.0, 3.2), layout="constrained")
        axes: Any = figure.subplots()
        steps, values = zip(*self.path, strict=True)
        for name, line in zip(_names(trainer, len(values[0])), zip(*values, strict=True), strict=True):
            axes.plot(steps, line, marker=".", label=name)
        axes.set(xlabel="upper iteration", ylabel="weight of the source", ylim=(0, 1))
        axes.legend(fontsize=8)
        return figure

    @override
    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.path:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("source_weights", self.figure(trainer), trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir  # all processes take part in agreeing on it
        if folder is not None and trainer.is_global_zero and self.path:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.figure(trainer).savefig(Path(folder) / "source_weights.png", dpi=120)


def _weights(module: Any) -> Tensor | None:
    """Returns the weights of the sources, or None where x is something else."""
    upper = module.hooks.upper
    return upper.logits.detach().softmax(0) if isinstance(upper, SourceWeights) else None


def _names(trainer: Trainer, number: int) -> list[str]:
    """Returns the names of the sources."""
    return getattr(trainer.datamodule, "names", None) or [str(s) for s in range(number)]  # type: ignore[attr-defined]
