"""What a person sees of hyper-cleaning: the weights, the suspicious images, and what the weights are worth."""

from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from bilevel_lightning.callbacks.figures import Figures, data_with
from bilevel_lightning.callbacks.pictures import Picture, draw
from bilevel_lightning.callbacks.retraining import Retraining
from bilevel_lightning.errors import positive


class WeightHistogram(Callback):
    """Histograms of the weights of clean and of corrupted samples in TensorBoard, after each validation."""

    @override
    @rank_zero_only
    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_with(trainer, "clean")
        if data is None:
            return
        weights = pl_module.hooks.upper(None, data.train[2].to(pl_module.device)).cpu()  # type: ignore[union-attr, operator]
        for name, chosen in (("clean", data.clean), ("corrupted", ~data.clean)):
            if chosen.any():
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_histogram(f"weights/{name}", weights[chosen], trainer.global_step)


class SuspiciousImages(Figures):
    """The training images with the smallest weights and their given labels: in TensorBoard and, at the end, as a PNG.

    Args:
        images: how many, shown in rows of eight. Default 32.
    """

    def __init__(self, images: int = 32) -> None:
        self.images = int(positive("SuspiciousImages.images", images))

    @override
    @torch.no_grad()
    def figures(self, trainer: Trainer, pl_module: Any) -> dict[str, Figure]:
        """Draws the images in the order of their weights; a cross and red mark a label that was in fact replaced."""
        data = data_with(trainer, "clean")
        if data is None:
            return {}
        images, labels, index = data.train
        weights = pl_module.hooks.upper(None, index.to(pl_module.device)).cpu()
        order = weights.argsort()[: self.images]
        step = trainer.global_step
        title = f"Smallest weights after {step} upper iterations: label given, weight (✗: the label is wrong)"

        def picture(i: Tensor) -> Picture:
            mark, color = ("", "black") if data.clean[i] else (" ✗", "#c1272d")
            return Picture(images[i], f"{int(labels[i])}, {weights[i]:.3f}{mark}", color)

        rows = [[picture(i) for i in row] for row in order.split(8)]
        return {"suspicious_images": draw(rows, title, cmap="gray", size=(1.08, 1.35))}


class CleaningReport(Retraining):
    """Retrains the model from scratch on the learnt weights and beside three controls, and prints the table.

    All rows start at the weights that the model had before the run, take the same steps, and are tested once, at the
    end, on the test set: nothing is selected on it. The loss is the weighted mean ``sum w_i CE_i / sum w_i`` with

    * *learnt weights*: w_i = sigmoid(x_i) of the run;
    * *all samples equally*: w_i = 1;
    * *validation data only*: training on the clean samples of the upper level;
    * *clean samples only (oracle)*: w_i = 1 for samples with a right label, else 0; unknown outside experiments.

    The first line of the table is y itself, the lower solution at the end of the run. The numbers go to the loggers as
    ``report/...`` too.

    Args:
        steps: optimizer steps of each training. Default 500.
        optimizer: any of torch's. Default SGD with step size 0.1 and momentum 0.9.
        batch_size: minibatch size, drawn with replacement; None (default): all samples at once.
    """

    def __init__(
        self,
        steps: int = 500,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        batch_size: int | None = None,
    ) -> None:
        super().__init__(steps, optimizer, batch_size)

    @override
    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_with(trainer, "clean")
        if data is None:
            return
        task: Any = pl_module.hooks
        like = next(task.lower.parameters())

        def move(part: tuple[Tensor, ...]) -> tuple[Any, ...]:
            return (part[0].to(like), *(t.to(like.device) for t in part[1:]))

        (images, labels, index), val, test = move(data.train), move(data.val), move(data.test)
        clean = data.clean.to(like.device)
        with torch.no_grad():
            found = task.metrics({"lower": (images, labels, index), "upper": test, "clean": clean})
            weights = task.upper(None, index)
        trainings = {
            "learnt weights": (images, labels, weights),
            "all samples equally": (images, labels, torch.ones_like(weights)),
            "validation data only": (*val, torch.ones_like(val[0][:, 0, 0, 0])),
            "clean samples only (oracle)": (images[clean], labels[clean], torch.ones_like(weights[clean])),
        }
        rows = {"y at the end of the run": found.pop("accuracy")}
        rows |= {name: self.retrain(name, x, y, w, test) for name, (x, y, w) in trainings.items()}
        self.show(trainer, {name: float(v) for name, v in rows.items()}, {name: float(v) for name, v in found.items()})

    def retrain(self, name: str, images: Tensor, labels: Tensor, weights: Tensor, test: tuple[Any, ...]) -> Tensor:
        """Trains a copy of the model from scratch and returns its accuracy on the test set."""

        def loss(model: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return (w * cross_entropy(model(x), y, reduction="none")).sum() / w.sum()

        model = self.trained(name, (images, labels, weights), loss).eval()
        with torch.no_grad():
            right: Tensor = model(test[0]).argmax(1) == test[1]
            return right.float().mean()

    def show(self, trainer: Trainer, rows: dict[str, float], found: dict[str, float]) -> None:
        """Prints and logs the report."""
        shown = {name: [f"{100 * value:.2f}"] for name, value in rows.items()}
        caption = f"from scratch, {self.steps} steps (not the first line)"
        self.print_table("What the weights are worth", caption, ("training data", "test accuracy %"), shown)
        if found:
            cleaning = Table(title="Which labels are right, by the weights")
            for name in found:
                cleaning.add_column(name.replace("_", " "), justify="right")
            cleaning.add_row(*(f"{value:.3f}" for value in found.values()))
            Console().print(cleaning)
        keys = {name.split(" (")[0].replace(" ", "_"): value for name, value in rows.items()}
        self.report(trainer, {**keys, **found})
