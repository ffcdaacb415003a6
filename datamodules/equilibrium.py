"""Minibatches of labelled images with their numbers, for equilibrium models."""

from abc import abstractmethod
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.datamodules.cleaning import CleaningData
from bilevel_lightning.datamodules.digits import DigitsCleaning
from bilevel_lightning.datamodules.iterations import Iterations
from bilevel_lightning.datamodules.mnist import MNISTCleaning
from bilevel_lightning.errors import BilevelError, positive


class EquilibriumData(LightningDataModule):
    r"""Base of the data modules of equilibrium models.

    Batches are ``{"lower": (images, index), "upper": labels}``: both levels see the same samples; images are floats in
    [0, 1] without further normalisation, shape ``(batch, channels, height, width)``, and ``index`` are the numbers of
    the samples in their split. Upper iteration k takes the minibatch ``k mod floor(train_samples / batch_size)`` of a
    permutation, which is a function of the seed and of how many of them went before, so that a run can be resumed
    anywhere. With several processes each takes every world-size-th sample of it. The images lie on the training device
    as bytes.

    Evaluations come in chunks; means over samples do not depend on their size.

    Args:
        batch_size: samples of one upper iteration. Default 600, as in the paper.
        val_samples: training images that are held out for validation; 0: train on all and validate on the first 10,000
            of them, as the paper's code does for its training figures. Default 10,000.
        evaluation_batch_size: samples of an evaluation's chunk. Default 2,000.
        epoch_length: upper iterations an epoch, after which validation runs. Default 100.
        seed: of the split and of the minibatches. Default 0.

    Attributes:
        train_samples: number of training samples, known after `setup`.
        image_shape: channels, height, width.
        classes: 10.

    Raises:
        BilevelError: if a setting is impossible or the data are missing or damaged.
    """

    image_shape: tuple[int, int, int]
    classes = 10
    levels = 255.0

    def __init__(
        self,
        batch_size: int = 600,
        val_samples: int = 10_000,
        evaluation_batch_size: int = 2000,
        epoch_length: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = int(positive("data.batch_size", batch_size))
        self.evaluation_batch_size = int(positive("data.evaluation_batch_size", evaluation_batch_size))
        self.epoch_length, self.seed = int(positive("data.epoch_length", epoch_length)), seed
        self.val_samples = val_samples
        if val_samples < 0:
            raise BilevelError(f"data.val_samples must not be negative, got {val_samples}.")

    @abstractmethod
    def images(self, train: bool) -> tuple[Tensor, Tensor]:
        """Returns the training or the test images, uint8 ``(n, *image_shape)``, and their labels."""

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train"):
            return
        images, labels = self.images(train=True)
        self.train_samples = len(images) - self.val_samples
        if self.train_samples < self.batch_size:
            raise BilevelError(
                f"data.val_samples={self.val_samples} leaves {self.train_samples} of {len(images)} training images, "
                f"which are no minibatch of data.batch_size={self.batch_size}; lower one of them."
            )
        order = torch.from_numpy(np.random.default_rng([self.seed, 0]).permutation(len(images)))
        held, used = order[: self.val_samples], order[self.val_samples :]
        self.train = (images[used], labels[used])
        self.val = (images[held], labels[held]) if len(held) else tuple(t[:10_000] for t in self.train)
        self.test = self.images(train=False)

    @override
    def train_dataloader(self) -> Iterations:
        assert self.trainer is not None
        device, rank, world = self.trainer.strategy.root_device, self.trainer.global_rank, self.trainer.world_size
        if self.batch_size < world:
            raise BilevelError(f"data.batch_size={self.batch_size} is less than the {world} processes; raise it.")
        data = tuple(t.to(device) for t in self.train)
        number = self.train_samples // self.batch_size

        @lru_cache(1)
        def permutation(epoch: int) -> Tensor:
            return torch.from_numpy(np.random.default_rng([self.seed, 1, epoch]).permutation(self.train_samples))

        def batch(k: int) -> dict[str, Any]:
            first = k % number * self.batch_size
            drawn = permutation(k // number)[first : first + self.batch_size // world * world]
            return self.take(data, drawn[rank::world].to(device))

        return Iterations(batch, self.epoch_length, self.trainer)

    def take(self, data: tuple[Tensor, ...], index: Tensor) -> dict[str, Any]:
        """Returns the batch of some samples."""
        images, labels = data
        return {"lower": (images[index].float() / self.levels, index), "upper": labels[index]}

    def _chunks(self, data: tuple[Tensor, ...]) -> Iterations:
        assert self.trainer is not None
        device, rank, world = self.trainer.strategy.root_device, self.trainer.global_rank, self.trainer.world_size
        data = tuple(t.to(device) for t in data)
        parts = torch.split(torch.arange(rank, len(data[0]), world, device=device), self.evaluation_batch_size)
        return Iterations(lambda k: self.take(data, parts[k]), len(parts))

    @override
    def val_dataloader(self) -> Iterations:
        return self._chunks(self.val)

    @override
    def test_dataloader(self) -> Iterations:
        return self._chunks(self.test)

    @override
    def predict_dataloader(self) -> Iterations:
        return self._chunks(self.test)


class MNISTEquilibrium(EquilibriumData):
    """MNIST, read from ``root/MNIST/raw`` (torchvision's layout), with its official test set.

    Args:
        root: folder of the data; default: the environment variable ``BILEVEL_DATA_DIR``, else ``data``.
        download: fetch missing files, with checksums. Default True.
        **settings: of `EquilibriumData`.
    """

    image_shape = (1, 28, 28)
    files: type[CleaningData] = MNISTCleaning

    def __init__(self, root: str | None = None, download: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.save_hyperparameters()
        self.source = self.files(root=root, download=download)

    @override
    def prepare_data(self) -> None:
        self.source.prepare_data()

    @override
    def images(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = self.source.source(train)
        return images.reshape(-1, *self.image_shape), labels


class DigitsEquilibrium(EquilibriumData):
    """scikit-learn's 8x8 digits, which come with that package: 1,297 are for training, the last 500 for tests.

    Args:
        batch_size: as in `EquilibriumData`. Default 100.
        val_samples: as in `EquilibriumData`. Default 297.
        **settings: of `EquilibriumData`.
    """

    image_shape = (1, 8, 8)
    levels = 16.0

    def __init__(self, batch_size: int = 100, val_samples: int = 297, **settings: Any) -> None:
        super().__init__(batch_size=batch_size, val_samples=val_samples, **settings)

    @override
    def images(self, train: bool) -> tuple[Tensor, Tensor]:
        source = DigitsCleaning().source(True)
        part = slice(1297) if train else slice(1297, None)
        images = torch.from_numpy(np.asarray(source.images)).reshape(-1, *self.image_shape)
        return images[part].to(torch.uint8), source.labels[part]
