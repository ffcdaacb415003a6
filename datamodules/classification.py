"""Data for training a network in the usual way, such as one that a search has found."""

import numpy as np
import torch
from typing_extensions import override

from bilevel_lightning.datamodules.augmented import AugmentedImages, CIFAR10Statistics, DigitsStatistics, Parts
from bilevel_lightning.datamodules.cifar10 import CIFAR10Files
from bilevel_lightning.datamodules.digits import DigitsFiles
from bilevel_lightning.datamodules.iterations import Iterations
from bilevel_lightning.datamodules.levels import Samples
from bilevel_lightning.errors import BilevelError


class TrainingData(AugmentedImages):
    r"""Base of the data modules that train one network in the usual way, such as `Retraining`.

    Training batches are ``(images, labels)``: an epoch goes once through a shuffle of the training images that is a
    function of (seed, epoch), and leaves out the last that fill no batch; random changes are a function of (seed,
    iteration, process). So a run can be resumed anywhere. With several processes each gets every world-size-th sample.

    Args:
        root: folder of the data; default: the environment variable ``BILEVEL_DATA_DIR``, else ``data``.
        download: fetch missing files, with checksums. Default True.
        train_samples: number of training images, of a shuffle with ``seed``; None (default): all but those of
            validation.
        val_samples: number of further images for validation. Default 0: there is none.
        batch_size: minibatch size. Default 96, DARTS's.
        image_size: side of the images, see `AugmentedImages`. Default: as they are.
        padding: of random crops. Default 4, DARTS's.
        flip: random reflections. Default True, DARTS's.
        cutout: side of the square, 0 for none. Default 16, DARTS's.
        evaluation_batch_size: largest number of images at once in an evaluation. Default 500.
        seed: of the selection, the shuffles and the random changes. Default 0.

    Attributes:
        train: images and labels of training.
        val: images and labels of validation.
        test: images and labels of the test set.

    Raises:
        BilevelError: if a setting is impossible, or the data are missing or damaged.
    """

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        train_samples: int | None = None,
        val_samples: int = 0,
        batch_size: int = 96,
        image_size: int | None = None,
        padding: int = 4,
        flip: bool = True,
        cutout: int = 16,
        evaluation_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            download=download,
            seed=seed,
            image_size=image_size,
            padding=padding,
            flip=flip,
            cutout=cutout,
            evaluation_batch_size=evaluation_batch_size,
        )
        self.save_hyperparameters()
        for name, value, least in (
            ("train_samples", train_samples, 1),
            ("val_samples", val_samples, 0),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise BilevelError(f"data.{name} must be at least {least}, got {value}.")
        self.train_samples, self.val_samples, self.batch_size = train_samples, val_samples, batch_size

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None and self.val_samples == 0:
            self.trainer.limit_val_batches = 0  # else Lightning warns of an empty loader
        if hasattr(self, "test"):
            return
        train = self.train_samples
        if train is None:
            train = len(self.source(train=True).labels) - self.val_samples
        names = f"data.train_samples={train} and data.val_samples={self.val_samples}"
        self.train, self.val, self.test = self.select([train, self.val_samples], names)

    @override
    def train_dataloader(self) -> Iterations:
        assert self.trainer is not None
        device, rank, world = self.trainer.strategy.root_device, self.trainer.global_rank, self.trainer.world_size
        images, labels = (t.to(device) for t in self.train)
        size, number = self.batch_size, len(labels) // self.batch_size
        if number == 0:
            raise BilevelError(f"data.batch_size={size} is more than the {len(labels)} training images; lower it.")
        if size < world:
            raise BilevelError(f"data.batch_size={size} is less than the {world} processes that share it; raise it.")

        def batch(k: int) -> Samples:
            epoch, i = divmod(k, number)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(labels))[i * size : (i + 1) * size]
            index = torch.from_numpy(order[rank : size // world * world : world]).to(device)
            return self.augment((images[index], labels[index]), [self.seed, k, rank])

        return Iterations(batch, number, self.trainer)

    @override
    def val_dataloader(self) -> Parts:
        return self.parts_of(self.val)

    @override
    def test_dataloader(self) -> Parts:
        return self.parts_of(self.test)

    @override
    def predict_dataloader(self) -> Parts:
        return self.parts_of(self.test)


class CIFAR10Training(CIFAR10Statistics, CIFAR10Files, TrainingData):
    """Training on CIFAR-10, from ``root/cifar-10-batches-py`` or ``root/cifar10`` (`CIFAR10Files`)."""


class DigitsTraining(DigitsStatistics, DigitsFiles, TrainingData):
    """Training on scikit-learn's 8x8 digits, which come with that package: no download.

    Args:
        train_samples: as in `TrainingData`. Default 1000.
        val_samples: as in `TrainingData`. Default 200; the other images are the test set.
        batch_size: as in `TrainingData`. Default 50.
        padding: as in `TrainingData`. Default 1.
        cutout: as in `TrainingData`. Default 0.
        evaluation_batch_size: as in `TrainingData`.
        seed: as in `TrainingData`.
    """

    def __init__(
        self,
        train_samples: int = 1000,
        val_samples: int = 200,
        batch_size: int = 50,
        padding: int = 1,
        cutout: int = 0,
        evaluation_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_samples=train_samples,
            val_samples=val_samples,
            batch_size=batch_size,
            padding=padding,
            flip=False,
            cutout=cutout,
            evaluation_batch_size=evaluation_batch_size,
            seed=seed,
        )
