"""Data hyper-cleaning: learn which training labels to trust."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_f1_score,
    binary_precision,
    binary_recall,
    multiclass_accuracy,
)
from typing_extensions import override

from bilevel_lightning.callbacks.cleaning import CleaningReport, SuspiciousImages, WeightHistogram
from bilevel_lightning.checks import check_classifier
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.models.weights import SampleWeights
from bilevel_lightning.task import BilevelTask


class HyperCleaning(BilevelTask):
    r"""Weights of training samples such that training on them does well on clean validation data.

    Upper: f(y) = mean over the validation samples of CE_j(y).
    Lower: g(x, y) = mean over the training samples of sigmoid(x_i) CE_i(y) + l2 |y|^2.

    Batches are those of `CleaningData`; without ``"clean"`` in a batch only the accuracy is computed. The metrics are,
    over all data of the stage: ``accuracy`` of y; ``precision``, ``recall`` and ``f1`` of "clean" (weight >= 0.5);
    ``auroc`` of the weights as a score for "clean"; ``weight_clean`` and ``weight_corrupted``, the mean weights of
    samples with right and with replaced labels. The last six use the knowledge which labels were replaced, which nobody
    has outside experiments: they are for reporting only.

    Args:
        model: network from images to logits, the lower variables.
        samples: number of training samples, equal to the data module's ``train_samples``. Default 5000.
        l2: factor of the squared norm of y in g. Default 0, as in PBGD and IAPTT-GM.

    Raises:
        BilevelError: if the data do not fit the number of samples or the model.

    References:
        L. Franceschi, M. Donini, P. Frasconi, M. Pontil. Forward and Reverse Gradient-Based Hyperparameter
        Optimization. ICML 2017.
    """

    def __init__(self, model: nn.Module, samples: int = 5000, l2: float = 0.0) -> None:
        super().__init__()
        self.upper: SampleWeights = SampleWeights(int(positive("HyperCleaning.samples", samples)))
        self.lower = model
        if l2 < 0:
            raise BilevelError(f"HyperCleaning.l2 must not be negative, got {l2}.")
        self.l2 = l2

    @override
    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.lower(images), labels)

    @override
    def lower_loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, labels, index = batch
        loss: Tensor = (self.upper(None, index) * cross_entropy(self.lower(images), labels, reduction="none")).mean()
        if self.l2:
            loss = loss + self.l2 * torch.stack([p.square().sum() for p in self.lower.parameters()]).sum()
        return loss

    @override
    def metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, labels = batch["upper"]
        logits, clean = self.lower(images), batch.get("clean")
        found = {"accuracy": multiclass_accuracy(logits, labels, logits.shape[1], average="micro")}
        if clean is None or clean.all():
            return found
        index = batch["lower"][2]
        weights, trusted = (
            self.upper(None, index),
            (self.upper.logits[index] >= 0).int(),
        )  # 0.5 hides small x in float32
        return {
            **found,
            "precision": binary_precision(trusted, clean),
            "recall": binary_recall(trusted, clean),
            "f1": binary_f1_score(trusted, clean),
            "auroc": binary_auroc(weights, clean.int()),
            "weight_clean": weights[clean].mean(),
            "weight_corrupted": weights[~clean].mean(),
        }

    @override
    def predict(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """Returns for each training sample its number, given label, label predicted by y, and weight."""
        images, labels, index = batch
        predicted = self.lower(images).argmax(1)
        return {"index": index, "label": labels, "predicted": predicted, "weight": self.upper(None, index)}

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        data: Any = datamodule
        images, _, index = data.train
        logits = self.upper.logits
        if len(index) != len(logits):
            raise BilevelError(
                f"The task has {len(logits)} weights but the data {len(index)} training samples: set task.samples and "
                f"data.train_samples to the same number."
            )
        check_classifier(self.lower, images, data.classes)

    @override
    def callbacks(self) -> list[Callback]:
        return [WeightHistogram(), SuspiciousImages(), CleaningReport()]
