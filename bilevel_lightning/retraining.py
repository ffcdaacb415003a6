"""Training of one genotype's network in the usual way."""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from bilevel_lightning import randomness
from bilevel_lightning.checks import plain
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.models.cells import Genotype, GenotypeNetwork
from bilevel_lightning.pickling import Picklable
from bilevel_lightning.schedules import Cosine, Schedule


class Retraining(Picklable, LightningModule):
    r"""Trains the network of a genotype from scratch; no bilevel problem, but what an architecture search is for.

    The loss is CE of the network plus ``auxiliary_weight`` times CE of the auxiliary head. In iteration k of N, edges
    are dropped with the probability ``drop_path`` k / N (`models.cells.drop_path`). Bound the gradient by Lightning's
    own ``trainer.gradient_clip_val`` (DARTS: 5). Logged: ``train/loss``, ``train/accuracy``, and the accuracy at
    validation and test.

    Args:
        genotype: a JSON file that a search wrote, a published name (`models.cells.PUBLISHED`), ``random``, or a
            genotype as one line. Checkpoints hold the line.
        genotype_seed: of ``random``. Default 0.
        genotype_nodes: nodes of each cell of ``random``. Default 4.
        image_shape: as in `GenotypeNetwork`.
        classes: as in `GenotypeNetwork`.
        channels: as in `GenotypeNetwork`. Default 36, DARTS's.
        layers: as in `GenotypeNetwork`. Default 20, DARTS's; MEHA's paper takes 8.
        stem_multiplier: as in `GenotypeNetwork`.
        auxiliary_weight: factor of the auxiliary loss; 0: there is no such head. Default 0.4, DARTS's.
        drop_path: probability at the end of training. Default 0.2, DARTS's.
        optimizer: any of torch's. Default SGD with step size 0.025, momentum 0.9 and weight decay 3e-4, DARTS's.
        scheduler: step-size schedule, stepped after each iteration: any of torch's, or one of
            `bilevel_lightning.schedules`, whose values multiply the step size. Default half a cosine to 0 over the
            run, DARTS's but that there it has a step an epoch.

    Raises:
        BilevelError: if a setting is impossible, or the data do not fit the network.

    References:
        H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable Architecture Search. ICLR 2019.
    """

    def __init__(
        self,
        genotype: str = "DARTS_V2",
        genotype_seed: int = 0,
        genotype_nodes: int = 4,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 36,
        layers: int = 20,
        stem_multiplier: int = 3,
        auxiliary_weight: float = 0.4,
        drop_path: float = 0.2,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.025, momentum=0.9, weight_decay=3e-4
        ),
        scheduler: Schedule | LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if auxiliary_weight < 0:
            raise BilevelError(f"auxiliary_weight must not be negative, got {auxiliary_weight}.")
        if not 0 <= drop_path < 1:
            raise BilevelError(f"drop_path must be in [0, 1), got {drop_path}.")
        # From Python, objects are the caller's to give again; from the command line their configs are stored.
        self.save_hyperparameters(ignore=[] if _given_hyperparameters.get() else ["optimizer", "scheduler"])
        for name in [k for k, v in self.hparams.items() if not plain(v)]:
            del self.hparams[name]
        self.genotype = Genotype.of(genotype, genotype_seed, genotype_nodes)
        self.hparams["genotype"] = str(self.genotype)  # a checkpoint needs no other file
        self.network = GenotypeNetwork(
            self.genotype, image_shape, classes, channels, layers, stem_multiplier, auxiliary_weight > 0
        )
        self.image_shape, self.classes = tuple(image_shape), classes
        self.auxiliary_weight, self.drop_path = auxiliary_weight, drop_path
        self.optimizer, self.scheduler = optimizer, scheduler
        self.accuracies = nn.ModuleDict(
            {f"{stage}_accuracy": MulticlassAccuracy(classes, average="micro") for stage in ("train", "val", "test")}
        )

    @property
    def iterations(self) -> int:
        """Number N of iterations of the run.

        Raises:
            BilevelError: if it has no end.
        """
        number = self.trainer.estimated_stepping_batches
        if not number < float("inf"):
            raise BilevelError("Retraining needs to know how long it trains: set trainer.max_steps or max_epochs.")
        return int(number)

    @override
    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        shape, classes = getattr(data, "image_shape", self.image_shape), getattr(data, "classes", self.classes)
        if (tuple(shape), classes) != (self.image_shape, self.classes):
            raise BilevelError(
                f"The data have images of shape {tuple(shape)} and {classes} classes: set model.image_shape and "
                f"model.classes to that, not to {self.image_shape} and {self.classes}."
            )

    @override
    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.optimizer(self.parameters())
        except ValueError as error:
            raise BilevelError(f"optimizer: {error}.") from error
        given = Cosine(1.0, 0.0, self.iterations) if self.scheduler is None else self.scheduler
        scheduler = given(optimizer) if not isinstance(given, Schedule) else LambdaLR(optimizer, _function(given))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, shape ``(batch, classes)``."""
        logits: Tensor = self.network(images)[0]
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.network.dropped = self.drop_path * self.global_step / self.iterations
        logits, second = self.network(images)
        loss = cross_entropy(logits, labels)
        if second is not None:
            loss = loss + self.auxiliary_weight * cross_entropy(second, labels)
        self._log_accuracy("train", logits, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_accuracy("val", self(batch[0]), batch[1])

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_accuracy("test", self(batch[0]), batch[1])

    def _log_accuracy(self, stage: str, logits: Tensor, labels: Tensor) -> None:
        metric: Any = self.accuracies[f"{stage}_accuracy"]
        metric(logits, labels)
        self.log(f"{stage}/accuracy", metric, metric_attribute=f"accuracies.{stage}_accuracy", prog_bar=True)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = randomness.saved()  # of dropped edges

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self._trainer.training and "random_state" in checkpoint:
            randomness.restore(checkpoint["random_state"])

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Returns label and prediction of each image."""
        images, labels = batch
        return {"label": labels, "predicted": self(images).argmax(1)}


def _function(schedule: Schedule) -> Callable[[int], float]:
    """Returns a schedule as a function, whose attributes, such as a run's length, a checkpoint does not bring back."""

    def factor(t: int) -> float:
        return schedule(t)

    return factor
