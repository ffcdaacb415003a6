"""Architecture search: learn which operations a network's cells are made of."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_accuracy
from typing_extensions import override

from bilevel_lightning.callbacks.architecture import ArchitectureFigures, GenotypeReport
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.models.cells import ArchitectureWeights, SearchNetwork
from bilevel_lightning.task import BilevelTask

Labelled = tuple[Tensor, Tensor]


class ArchitectureSearch(BilevelTask):
    r"""Weights of operations such that a network trained with them does well on other images (DARTS).

    Upper: f(x, y) = mean over the upper level's images of CE_j(x, y) + upper_l2 |x|^2.
    Lower: g(x, y) = mean over the lower level's images of CE_i(x, y) + l2 |y|^2.

    x are the logits of the operations on each edge of the two kinds of cells, and of the edges where the network has
    edge normalisation (`ArchitectureWeights`); y the parameters of the network (`SearchNetwork`). At the end of a run
    the genotype is read out of x: printed, drawn, and saved as ``genotype.json`` in the run's folder; `Retraining`
    trains it.

    Batches are those of `SearchData`. ``val/accuracy`` is that of the network with all operations on the images of the
    upper level, which x is fitted to: it says how the search goes, not what the found network will do.

    Args:
        network: the lower variables.
        l2: factor of the squared norm of y in g. Default 1.5e-4: a weight decay of 3e-4 in torch's sense, DARTS's.
        upper_l2: factor of the squared norm of x in f. Default 0; DARTS's weight decay of 1e-3 is 5e-4.
        scale: standard deviation of the first logits. Default 1e-3, DARTS's.

    Raises:
        BilevelError: if a setting is impossible, or the data do not fit the network.

    References:
        H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable Architecture Search. ICLR 2019.
    """

    upper: ArchitectureWeights
    lower: SearchNetwork

    def __init__(self, network: SearchNetwork, l2: float = 1.5e-4, upper_l2: float = 0.0, scale: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("l2", l2), ("upper_l2", upper_l2)):
            if value < 0:
                raise BilevelError(f"ArchitectureSearch.{name} must not be negative, got {value}.")
        self.upper = network.architecture(positive("ArchitectureSearch.scale", scale))
        self.lower, self.l2, self.upper_l2 = network, l2, upper_l2

    def logits(self, images: Tensor) -> Tensor:
        """Returns the network's logits with the current weights of operations."""
        found: Tensor = self.lower(images, self.upper())
        return found

    @override
    def upper_loss(self, batch: Labelled) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.logits(images), labels)
        if self.upper_l2:
            loss = loss + self.upper_l2 * torch.stack([p.square().sum() for p in self.upper.parameters()]).sum()
        return loss

    @override
    def lower_loss(self, batch: Labelled) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.logits(images), labels)
        if self.l2:
            loss = loss + self.l2 * torch.stack([p.square().sum() for p in self.lower.parameters()]).sum()
        return loss

    @override
    def metrics(self, batch: dict[str, Labelled]) -> dict[str, Tensor]:
        images, labels = batch["upper"]
        logits = self.logits(images)
        return {"accuracy": multiclass_accuracy(logits, labels, logits.shape[1], average="micro")}

    @override
    def predict(self, batch: Labelled) -> dict[str, Tensor]:
        """Returns label and prediction of each image."""
        images, labels = batch
        return {"label": labels, "predicted": self.logits(images).argmax(1)}

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        data: Any = datamodule
        network, shape = self.lower, tuple(data.image_shape)
        if shape != network.image_shape:
            raise BilevelError(
                f"task.network.image_shape is {network.image_shape} but the data's images have the shape {shape}: set "
                "one to the other (data.image_size)."
            )
        if data.classes != network.classifier.out_features:
            raise BilevelError(
                f"The data have {data.classes} classes: set task.network.classes to that, not to "
                f"{network.classifier.out_features}."
            )

    @override
    def callbacks(self) -> list[Callback]:
        return [ArchitectureFigures(), GenotypeReport()]
