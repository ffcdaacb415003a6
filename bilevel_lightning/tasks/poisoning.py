"""Data poisoning: small perturbations of some training images that harm whoever trains on them."""

from typing import Any, Literal, get_args

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_accuracy
from typing_extensions import override

from bilevel_lightning.callbacks.poisoning import PoisonedImages, PoisoningReport
from bilevel_lightning.checks import check_classifier
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.projections import ORDERS, Ball, BallInBox
from bilevel_lightning.task import BilevelTask, Minibatches
from bilevel_lightning.tree import Params

Norm = Literal["l2", "l1", "linf"]
Method = Literal["nearest", "ball_then_box"]
ROWS = 512  # projected at once, so that they stay in a processor's cache


class Perturbations(nn.Module):
    """One perturbation delta_i for each poisoned image u_i, zero at the beginning.

    Args:
        samples: number of poisoned images.
        image_shape: channels, height, width.
        radius: largest norm of each delta_i.
        norm: ``l2``, ``l1`` or ``linf``.
        projection: see `Poisoning`.

    Attributes:
        delta: the perturbations, shape ``(samples, *image_shape)``.
        images: the images u_i, which are the data's and in no checkpoint; None before they are known.
    """

    images: Tensor | None

    def __init__(
        self, samples: int, image_shape: tuple[int, int, int], radius: float, norm: Norm, projection: Method
    ) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(samples, *image_shape))
        self.register_buffer("images", None, persistent=False)
        self.order, self.projection = ORDERS[norm], projection
        self.ball, self.ball_in_box = Ball(radius, norm, dims=3), BallInBox(radius, norm, dims=3)

    def forward(self, index: Tensor) -> Tensor:
        """Returns the perturbations of these numbers, shape ``(index, *image_shape)``."""
        return self.delta[index]

    @torch.no_grad()
    def norms(self, delta: Tensor | None = None) -> Tensor:
        """Returns the norm of each perturbation, shape ``(samples,)``; default: those of `delta`."""
        delta = self.delta if delta is None else delta
        size: Tensor = torch.linalg.vector_norm(delta.flatten(1), self.order, 1)
        return size

    @torch.no_grad()
    def project(self, delta: Tensor) -> Tensor:
        """Returns perturbations with norms within the radius that leave all pixels in [0, 1], by default the nearest.

        Raises:
            BilevelError: if the images are not known.
        """
        if self.images is None:
            raise BilevelError(
                "Poisoning keeps pixels in [0, 1] and does not know the images: train with a datamodule, or give them "
                "to the task by check_data(datamodule)."
            )
        low, high = -self.images, 1 - self.images
        if self.projection == "ball_then_box":
            return self.ball(delta).clamp(low, high)
        rounded = self.ball.radius * (1 + 4 * torch.finfo(delta.dtype).eps)  # else points of the sphere go again
        inside = ((delta >= low) & (delta <= high)).flatten(1).all(1) & (self.norms(delta) <= rounded)
        nearest = delta.clone()
        for rows in torch.split((~inside).nonzero().flatten(), ROWS):
            nearest[rows] = self.ball_in_box(delta[rows], low[rows], high[rows])
        return nearest

    def noise(self, seed: int = 0) -> Tensor:
        """Returns random perturbations, the projections of 1000 N(0, 1): what an attack has to beat."""
        drawn = torch.randn(self.delta.shape, generator=torch.Generator().manual_seed(seed), dtype=self.delta.dtype)
        return self.project(1000 * drawn.to(self.delta.device))


class Poisoning(BilevelTask):
    r"""Perturbations of a part of the training images such that a model trained on them does badly.

    Upper: f(y) = - mean over the validation images of CE_j(y), over perturbations delta_i with ``|delta_i| <= radius``
    and pixels u_i + delta_i in [0, 1], on whose intersection delta is projected after each step.
    Lower: g(delta, y) = mean over the training images of CE_i(y) + ridge * mean of the squared entries of y, where
    poisoned images are u_i + delta_i.

    Batches are those of `PoisoningData`. Once in an upper iteration `prepare` gathers the perturbations of all
    minibatches, which are the upper variables that algorithms see; their gradients go back to delta together. No
    minibatch touches another image's perturbation.

    Metrics, over all data of the stage: ``accuracy`` and ``cross_entropy`` of y; ``norm`` and ``largest_norm``, of the
    perturbations in their norm; ``moved``, the share of poisoned images that are perturbed at all.

    Args:
        model: network from images to logits, the lower variables.
        samples: number of poisoned images, those of the data. Default 9000, MNIST's.
        image_shape: channels, height, width of an image. Default MNIST's.
        radius: largest norm of a perturbation. Default 5. In the released code of Grazzi et al. 5 for l2, 0.2 for linf
            and 50 for l1, on MNIST.
        norm: ``l2`` (default), ``l1`` or ``linf``, over all channels and pixels.
        ridge: factor of the mean squared entry of y. Default 0.1, as there.
        projection: ``nearest`` (default): the projection on the intersection of ball and box. ``ball_then_box``: on the
            one, then on the other, as in that code. The result is feasible but not the nearest point, with smaller
            norms, which makes attacks weaker (docs/poisoning.md).

        random_start: seed of a random start, the projections of 1000 N(0, 1) as in that code, once the images are
            known; with 0 it is the *random noise* of `PoisoningReport`. Default None: delta starts at zero.

    Raises:
        BilevelError: if a setting is impossible, or the data do not fit the number of samples or the model.

    References:
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023.
    """

    upper: Perturbations

    def __init__(
        self,
        model: nn.Module,
        samples: int = 9000,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        radius: float = 5.0,
        norm: Norm = "l2",
        ridge: float = 0.1,
        projection: Method = "nearest",
        random_start: int | None = None,
    ) -> None:
        super().__init__()
        positive("Poisoning.samples", samples)
        positive("Poisoning.radius", radius)
        if norm not in ORDERS:
            raise BilevelError(f"Poisoning.norm must be one of {', '.join(ORDERS)}, got {norm}.")
        if ridge < 0:
            raise BilevelError(f"Poisoning.ridge must not be negative, got {ridge}.")
        if projection not in get_args(Method):
            raise BilevelError(f"Poisoning.projection must be nearest or ball_then_box, got {projection}.")
        self.upper = Perturbations(int(samples), image_shape, radius, norm, projection)
        self.lower, self.ridge, self.random_start = model, ridge, random_start

    @override
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds to each lower minibatch where its poisoned images are, and their perturbations, gathered at once."""
        lower = batch["lower"]
        parts = lower if isinstance(lower, Minibatches) else [lower]
        where = [(part[2] >= 0).nonzero().flatten() for part in parts]
        index = torch.cat([part[2][i] for part, i in zip(parts, where, strict=True)])
        deltas = self.upper(index).split([len(i) for i in where])
        made = Minibatches((*part, i, delta) for part, i, delta in zip(parts, where, deltas, strict=True))
        return {**batch, "lower": made if isinstance(lower, Minibatches) else made[0]}

    @override
    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return -cross_entropy(self.lower(images), labels)

    @override
    def lower_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels, index, *prepared = batch
        if prepared:
            where, delta = prepared
        else:
            where = (index >= 0).nonzero().flatten()
            delta = self.upper(index[where])
        return self.training_loss(self.lower, images.index_add(0, where, delta), labels)

    def training_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean cross-entropy and the ridge term, for images as they are given."""
        loss = cross_entropy(model(images), labels)
        if self.ridge:
            entries = torch.cat([p.flatten() for p in model.parameters()])
            loss = loss + self.ridge * entries.square().mean()
        return loss

    @override
    def project_upper(self, upper: Params) -> Params:
        return {"delta": self.upper.project(upper["delta"])}

    @override
    def metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, labels = batch["upper"]
        logits, norms = self.lower(images), self.upper.norms()
        return {
            "accuracy": multiclass_accuracy(logits, labels, logits.shape[1], average="micro"),
            "cross_entropy": cross_entropy(logits, labels),
            "norm": norms.mean(),
            "largest_norm": norms.max(),
            "moved": (norms > 0).float().mean(),
        }

    @override
    def predict(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """Returns for each poisoned image its number, label, what y predicts without and with delta, and its norm."""
        images, labels, index = batch
        delta = self.upper(index)
        return {
            "index": index,
            "label": labels,
            "predicted_clean": self.lower(images).argmax(1),
            "predicted": self.lower(images + delta).argmax(1),
            "norm": self.upper.norms(delta),
        }

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        """Also takes the poisoned images from the data, which the projection and a random start need."""
        data: Any = datamodule
        images, _, index = data.poisoned
        delta = self.upper.delta
        if len(index) != len(delta):
            raise BilevelError(
                f"The task has {len(delta)} perturbations but the data {len(index)} poisoned images: set "
                f"task.samples to {len(index)}, or change data.samples, data.val_share or data.poisoned_share."
            )
        if images.shape[1:] != delta.shape[1:]:
            raise BilevelError(
                f"task.image_shape is {tuple(delta.shape[1:])} but the data's images have the shape "
                f"{tuple(images.shape[1:])}: set it to that."
            )
        check_classifier(self.lower, images, data.classes)
        self.upper.images = images.to(delta)
        if self.random_start is not None and not delta.any():  # what was learnt, or loaded, stays
            with torch.no_grad():
                delta.copy_(self.upper.noise(self.random_start))

    @override
    def callbacks(self) -> list[Callback]:
        return [PoisonedImages(), PoisoningReport()]
