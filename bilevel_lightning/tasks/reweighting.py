"""Data reweighting: learn how much each training sample counts, by its loss, its number or its source."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy
from typing_extensions import override

from bilevel_lightning.callbacks.reweighting import ReweightingReport, SourceWeightCurve, WeightFigure
from bilevel_lightning.checks import output_shape
from bilevel_lightning.datamodules.levels import TwoLevelData
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.models.weights import LossWeights, SampleWeights, SourceWeights
from bilevel_lightning.task import BilevelTask, Minibatches

ROWS = 500  # samples that are evaluated at once at validation and test


class Reweighting(BilevelTask):
    r"""Weights of training samples such that training on them does well on a small clean and balanced meta set.

    Upper: f(y) = mean over the meta samples of l_j(y).
    Lower: g(x, y) = mean over the training samples of w_i(x) l_i(y) + l2 |y|^2; with ``normalize`` the weights of each
    minibatch (with several processes, of each one's part) are divided by their mean.

    l_i is the cross-entropy of ``model(inputs)``, whose last dimension are the classes; for outputs of shape ``(batch,
    length, vocabulary)`` with targets ``(batch, length)`` the mean over the positions, so that a language model fits.
    A lower batch is ``(inputs, targets, index, source)``, an upper batch ``(inputs, targets)``.

    `LossWeights` get l_i at the y at which the upper iteration begins, fixed during it (`prepare`, one more evaluation
    of the network, not counted as an oracle): g is then a function of (x, y), so that its derivatives commute, and one
    step of gradient descent, differentiated (`TRHG` with K = T = 1, `DARTS`), is Meta-Weight-Net's look-ahead. Of its
    published codes the one for imbalance normalises in the look-ahead too, and has the derivative of a weight with
    respect to its loss in y's gradient, which is not the paper's. Both step y again at the new weights; here the
    looked-ahead y is the next one.

    Metrics, over all data of the stage: ``accuracy``; where targets are one class a sample, ``balanced_accuracy``, the
    mean over the classes, and ``class_accuracy_0``, ...; with `SourceWeights`, ``source_weight_0``, ...; where a batch
    says with ``"clean"`` which samples of its lower part have a right target, ``auroc`` of the weights as a score for
    "clean", ``weight_clean`` and ``weight_corrupted``, the mean weights, before normalisation.

    Args:
        model: network from inputs to logits, the lower variables.
        weights: `LossWeights`, `SampleWeights`, `SourceWeights`, or a module that is called like them, the upper
            variables.
        l2: factor of the squared norm of y in g; half of what optimizers call weight decay. Default 0.
        normalize: divide the weights of a minibatch by their mean, so that their scale is no step size. Default False,
            the paper's lower loss; its published codes normalise the step of y.

    Raises:
        BilevelError: if l2 is negative, or the data do not fit the weights or the model.

    References:
        J. Shu, Q. Xie, L. Yi, Q. Zhao, S. Zhou, Z. Xu, D. Meng. Meta-Weight-Net: Learning an Explicit Mapping For
        Sample Weighting. NeurIPS 2019.
        M. Ren, W. Zeng, B. Yang, R. Urtasun. Learning to Reweight Examples for Robust Deep Learning. ICML 2018.
    """

    def __init__(self, model: nn.Module, weights: nn.Module, l2: float = 0.0, normalize: bool = False) -> None:
        super().__init__()
        self.upper, self.lower = weights, model
        if l2 < 0:
            raise BilevelError(f"Reweighting.l2 must not be negative, got {l2}.")
        self.l2, self.normalize = l2, normalize

    def outputs(self, inputs: Tensor) -> Tensor:
        """Returns the logits; in evaluation mode from parts of the samples, so that a whole test set fits in memory."""
        if self.training or len(inputs) <= ROWS:
            logits: Tensor = self.lower(inputs)
            return logits
        return torch.cat([self.lower(part) for part in torch.split(inputs, ROWS)])

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns each sample's loss, shape ``(batch,)``."""
        logits = self.outputs(inputs)
        each = cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
        return each if each.ndim == 1 else each.flatten(1).mean(1)

    @override
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds to each lower minibatch the losses that the weights are functions of, where they are."""
        if not isinstance(self.upper, LossWeights):
            return batch
        lower = batch["lower"]
        with torch.no_grad():
            made = Minibatches(
                (*part, self.losses(*part[:2])) for part in (lower if isinstance(lower, Minibatches) else [lower])
            )
        return {**batch, "lower": made if isinstance(lower, Minibatches) else made[0]}

    @override
    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.losses(*batch).mean()

    @override
    def lower_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets, index, source, *prepared = batch
        each = self.losses(inputs, targets)
        weights: Tensor = self.upper(prepared[0] if prepared else each.detach(), index, source)
        if self.normalize:
            weights = weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)
        loss = (weights * each).mean()
        if self.l2:
            loss = loss + self.l2 * torch.stack([p.square().sum() for p in self.lower.parameters()]).sum()
        return loss

    @override
    def metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs, targets = batch["upper"]
        logits = self.outputs(inputs)
        classes = logits.shape[-1]
        guess, right = logits.flatten(0, -2).argmax(1), targets.flatten()
        found = {"accuracy": multiclass_accuracy(guess, right, classes, average="micro")}
        if targets.ndim == 1:
            each = multiclass_accuracy(guess, right, classes, average="none")
            found["balanced_accuracy"] = multiclass_accuracy(guess, right, classes, average="macro")
            found |= {f"class_accuracy_{c}": value for c, value in enumerate(each)}
        if isinstance(self.upper, SourceWeights):
            found |= {f"source_weight_{s}": value for s, value in enumerate(self.upper.logits.softmax(0))}
        clean = batch.get("clean")
        if clean is not None and not clean.all():
            weights = self.weigh(batch["lower"])
            found["auroc"] = binary_auroc(weights, clean.int())
            found |= {"weight_clean": weights[clean].mean(), "weight_corrupted": weights[~clean].mean()}
        return found

    def weigh(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Returns the weights of the samples of a lower batch at the current y, before normalisation."""
        inputs, targets, index, source, *prepared = batch
        if isinstance(self.upper, LossWeights):
            prepared = prepared or [self.losses(inputs, targets)]
        weights: Tensor = self.upper(prepared[0].detach() if prepared else None, index, source)
        return weights

    @override
    def predict(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Returns for each training sample its number, source, loss and weight."""
        each = self.losses(*batch[:2])
        return {
            "index": batch[2],
            "source": batch[3],
            "loss": each,
            "weight": self.upper(each.detach(), batch[2], batch[3]),
        }

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        if not isinstance(datamodule, TwoLevelData):
            return
        lower = datamodule.levels()[0]
        if len(lower) != 4:
            raise BilevelError(
                f"Reweighting needs lower samples (inputs, targets, index, source), and those of "
                f"{type(datamodule).__name__} have {len(lower)} parts: use one of the ...Reweighting data modules."
            )
        inputs, targets, index, source = lower
        self._fits(SampleWeights, "samples", len(index), "training samples")
        self._fits(SourceWeights, "sources", int(source.max()) + 1, "sources")
        shape = output_shape(self.lower, inputs)
        if shape[:-1] != tuple(targets[:1].shape) or shape[-1] <= int(targets.max()):
            raise BilevelError(
                f"task.model returns shape {shape} for one sample, whose targets have shape {tuple(targets[:1].shape)} "
                f"and go up to {int(targets.max())}: it must have the classes, all of them, in its last dimension."
            )

    def _fits(self, kind: type[SourceWeights] | type[SampleWeights], setting: str, number: int, what: str) -> None:
        """Compares the number of weights of that kind with what the data have."""
        if isinstance(self.upper, kind) and len(self.upper.logits) != number:
            raise BilevelError(
                f"{kind.__name__} has {len(self.upper.logits)} weights but the data {number} {what}: set "
                f"task.weights.{setting} to that number."
            )

    @override
    def callbacks(self) -> list[Callback]:
        weights = SourceWeightCurve() if isinstance(self.upper, SourceWeights) else WeightFigure()
        return [weights, ReweightingReport()]
